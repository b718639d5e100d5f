"""Importance of keys to the last queries, against the whole softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import attention, last
from isthmus.attention.last import last_importance
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
  "rows, keys, pieces", [(4, 37, 1), (50, 30, 1), (4, 36, 4), (20, 32, 1)]
)
def test_equals_the_whole_softmax(rows, keys, pieces, causal, monkeypatch):
  """Also of keys in pieces, which have to hold the last queries' own ones."""
  monkeypatch.setattr(last, "PIECE", 8)
  seen = []

  def attend(q, k, *others, **settings):
    seen.append(k.shape[0] // 2)
    return attention(q, k, *others, **settings)

  monkeypatch.setattr(last, "attention", attend)
  q, k, *_ = inputs(2, 33, 37, 4, 2, 8)
  k = k[:, :keys]
  found = last_importance(q, k, rows=rows, causal=causal, scale=0.7)
  rows = min(rows, 33)
  wide = np.repeat(np.asarray(k, np.float64), 2, axis=2)
  x = np.einsum("btnd,bsnd->bnts", np.asarray(q, np.float64), wide) * 0.7
  x = x[:, :, 33 - rows :]
  if causal:
    at = np.arange(keys - rows, keys)[:, None]
    x = np.where(np.arange(keys) <= at, x, -np.inf)
  p = np.exp(x)
  want = (p / np.maximum(p.sum(-1, keepdims=True), 1e-30)).mean(2)
  np.testing.assert_allclose(found, want, atol=1e-6)
  assert found.shape == (2, 4, keys) and seen == [pieces]


def test_rows_and_keys_never_all_meet():
  """Nothing is as large as all rows and all keys of all heads."""
  x = jax.ShapeDtypeStruct((1, 2**17, 8, 16), jnp.bfloat16)
  f = lambda q, k: last_importance(q, k, rows=128, causal=True)
  memory = jax.jit(f).lower(x, x).compile().memory_analysis()
  # Some rows of them, and keys in float32; all logits would be 537 MB.
  assert memory.temp_size_in_bytes < 8 * 128 * 2**17 * 4 / 2
