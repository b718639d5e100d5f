"""The backward kernel alone, on lists that are made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from isthmus.pallas.moba.mosaic_backward import LOG2E, backward
from tests.pallas.moba.test_mosaic_forward import arrays, by_tiles, lists

pytestmark = pytest.mark.once


def check(width, d, scale=0.3):
  """lse and delta are anything, as those of all that a row reads are."""
  q, do, k, v = arrays(width, d)
  tiles, rng = lists(width), np.random.default_rng(3)
  lse, delta = (rng.random(q.shape[:2]).astype("float32") for _ in range(2))
  lse = lse + scale**2 * d
  lse[:, 5] = np.inf
  dq, dk, dv = jax.jit(lambda *x: backward(*x, scale=scale))(
    q, do, k, v, jnp.asarray(lse * LOG2E), jnp.asarray(delta), tiles
  )
  rows, cotangents = (np.asarray(x, np.float64) for x in (q, do))
  want_k, want_v = (np.zeros(k.shape) for _ in range(2))
  errors = []

  def one(lane, span, block, k, v, seen):
    x = rows[lane, span] @ k[lane, block].T * scale
    p = np.where(seen, np.exp(x - lse[lane, span][:, None]), 0)
    dx = cotangents[lane, span] @ v[lane, block].T
    dx = p * (dx - delta[lane, span][:, None])
    want_v[lane, block] += p.T @ cotangents[lane, span]
    want_k[lane, block] += scale * dx.T @ rows[lane, span]
    want = dx @ k[lane, block]
    error = np.abs(np.asarray(dq[lane, span], np.float64) - want).max()
    errors.append(error / np.abs(want).max())

  by_tiles(one, q, k, v, tiles)
  assert max(errors) < 1e-2
  for got, want in ((dk, want_k), (dv, want_v)):
    error = np.abs(np.asarray(got, np.float64) - want).max()
    assert error < 1e-2 * np.abs(want).max()
    # A block that no row chose.
    assert not np.asarray(got[0, 1], np.float32).any()


@pytest.mark.parametrize("width, d", [(64, 64), (128, 128)])
def test_equals_the_oracle(width, d):
  with interpreted():
    check(width, d)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("width", [64, 128])
def test_equals_the_oracle_on_gpu(width, d):
  check(width, d)
