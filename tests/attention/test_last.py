"""Importance of keys to the last queries, against the whole softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.last import (
  importance_and_means,
  last_importance,
  last_mass,
)
from isthmus.attention.pooling import pool_blocks
from isthmus.pallas.scores.api import Options
from tests.attention.oracle import inputs
from tests.pallas.scores.cases import logits

pytestmark = pytest.mark.once

CASES = [(4, 37), (50, 30), (20, 32)]


def mean_softmax(q, k, rows, causal, scale):
  """Of the last rows, in float64."""
  p = np.exp(logits(q[:, -rows:], k, Options(128, "sum", causal, scale)))
  return (p / np.maximum(p.sum(-1, keepdims=True), 1e-30)).mean(2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows, keys", CASES)
def test_equals_the_whole_softmax(rows, keys, causal):
  """Also of more queries than keys, of which some see nothing."""
  q, k, *_ = inputs(2, 33, 37, 4, 2, 8)
  k = k[:, :keys]
  found = last_importance(q, k, rows=rows, causal=causal, scale=0.7)
  assert found.shape == (2, 4, keys)
  want = mean_softmax(q, k, rows, causal, 0.7)
  np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("t", [300, 256, 60])
def test_means_of_all_queries_come_with_it(t, causal):
  """Of whole blocks and a short one; queries may be more than keys."""
  q, k, *_ = inputs(2, t, 37, 4, 2, 8)
  found, means = importance_and_means(q, k, rows=20, causal=causal, scale=0.7)
  want = last_importance(q, k, rows=20, causal=causal, scale=0.7)
  np.testing.assert_array_equal(found, want)
  np.testing.assert_array_equal(means, pool_blocks(q, 128))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [4, 16, 24, 256])
@pytest.mark.parametrize("rows, keys", CASES)
def test_mass_is_its_sum_over_blocks(rows, keys, block, causal):
  """Of sizes that divide 128, that it divides, and that do neither."""
  q, k, *_ = inputs(2, 33, 37, 4, 2, 8)
  k = k[:, :keys]
  found = last_mass(q, k, rows=rows, block=block, causal=causal, scale=0.7)
  want = mean_softmax(q, k, rows, causal, 0.7)
  want = np.pad(want, ((0, 0), (0, 0), (0, -keys % block)))
  want = want.reshape(2, 4, -1, block).sum(-1)
  assert found.shape == want.shape
  np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.parametrize(
  "f",
  [
    lambda q, k: last_importance(q, k, rows=128, causal=True),
    lambda q, k: importance_and_means(q, k, rows=128, causal=True),
    lambda q, k: last_mass(q, k, rows=128, block=128, causal=True),
  ],
)
def test_rows_and_keys_never_all_meet(f):
  """Nothing is as large as all rows and all keys of all heads."""
  x = jax.ShapeDtypeStruct((1, 2**17, 8, 16), jnp.bfloat16)
  memory = jax.jit(f).lower(x, x).compile().memory_analysis()
  # Some rows of them, and keys in float32; all logits would be 537 MB.
  assert memory.temp_size_in_bytes < 8 * 128 * 2**17 * 4 / 2
