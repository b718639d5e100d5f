"""Importance of keys to the last queries, against the whole softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.last import last_importance
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows, keys, chunk", [(4, 37, 8), (50, 30, 64)])
def test_equals_the_whole_softmax(rows, keys, chunk, causal):
  q, k, *_ = inputs(2, 33, 37, 4, 2, 8)
  found = last_importance(
    q, k, rows=rows, keys=keys, causal=causal, scale=0.7, chunk=chunk
  )
  rows = min(rows, 33)
  wide = np.repeat(np.asarray(k, np.float64), 2, axis=2)[:, :keys]
  x = np.einsum("btnd,bsnd->bnts", np.asarray(q, np.float64), wide) * 0.7
  x = x[:, :, 33 - rows :]
  if causal:
    at = np.arange(37 - rows, 37)[:, None]
    x = np.where(np.arange(keys) <= at, x, -np.inf)
  p = np.exp(x - x.max(-1, keepdims=True))
  want = (p / p.sum(-1, keepdims=True)).mean(2)
  np.testing.assert_allclose(found, want, atol=1e-6)
  assert found.shape == (2, 4, keys)


def test_rows_and_keys_meet_in_chunks():
  """Nothing as large as all rows and all keys of all heads."""
  x = jax.ShapeDtypeStruct((1, 2**17, 8, 16), jnp.bfloat16)
  f = lambda q, k: last_importance(q, k, rows=128, keys=2**17, causal=True)
  memory = jax.jit(f).lower(x, x).compile().memory_analysis()
  # Keys in chunks, and the result; all logits would be 537 MB.
  assert memory.temp_size_in_bytes < 8 * 128 * 2**17 * 4 / 4
