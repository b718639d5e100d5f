"""The kernel of reduced scores, of arrays that are whole tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from isthmus.pallas.scores import mosaic_reduce, ref
from isthmus.pallas.scores.api import Options
from isthmus.pallas.scores.mosaic_reduce import LOG2E, reduce_tiles
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once


def test_lengths_hide_what_is_padding():
  x, y, *_ = inputs(1, 128, 384, 1, 1, 64, dtype=jnp.bfloat16)
  lse = jnp.full((1, 1, 128), 3.0)
  options = Options(64, "sum", causal=False)
  with interpreted():
    found = jax.jit(
      lambda *a: reduce_tiles(*a, lengths=(128, 300), options=options)
    )(x, y, lse * LOG2E)
  want = ref.reduce_scores(x, y[:, :300], lse, options=options)
  np.testing.assert_allclose(found[:, :, :5], want, rtol=1e-5, atol=1e-6)
  assert not np.asarray(found[:, :, 5]).any()


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("causal", [True, False])
def test_few_queries_stay_while_keys_go_by(reduce, causal):
  """More tiles of rows than are walked along, the last walk a short one."""
  rows = 64 * mosaic_reduce.REACH + 128
  q, k, *_ = inputs(2, 128, rows, 4, 2, 64, dtype=jnp.bfloat16)
  lse = jax.random.normal(jax.random.key(1), (2, 4, 100)) + 3
  options = Options(64, reduce, "columns", causal)
  ends = ((0, 0), (0, 0), (0, 28))
  wide = jnp.pad(lse * LOG2E, ends, constant_values=jnp.inf)
  with interpreted():
    found = jax.jit(
      lambda *a: reduce_tiles(*a, lengths=(rows, 100), options=options)
    )(k, q, wide)
  want = ref.reduce_scores(k, q[:, :100], lse, options=options)
  assert found.shape == (2, 4, 2, rows)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
