"""The kernel of reduced scores, of arrays that are whole tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from isthmus.pallas.scores import ref
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
