"""The kernel of importance, of arrays that are whole tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from isthmus.pallas import hopper
from isthmus.pallas.importance import ref
from isthmus.pallas.importance.api import Options
from isthmus.pallas.importance.mosaic_sum import LOG2E, sum_tiles
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [1152, 128])
def test_queries_stay_while_keys_go_by(causal, keys, monkeypatch):
  """Several walks, the last a short one; and fewer tiles than warpgroups."""
  monkeypatch.setattr(hopper, "PROCESSORS", 16)
  jax.clear_caches()
  q, k, *_ = inputs(1, 256, keys, 2, 1, 64, dtype=jnp.bfloat16)
  lse = jax.random.normal(jax.random.key(1), (1, 2, 200)) + 3
  ends = ((0, 0), (0, 0), (0, 56))
  wide = jnp.pad(lse * LOG2E, ends, constant_values=jnp.inf)
  options = Options(causal)
  with interpreted():
    found = jax.jit(
      lambda *a: sum_tiles(*a, lengths=(200, keys), options=options)
    )(q, k, wide)
  jax.clear_caches()
  want = ref.importance(q[:, :200], k, lse, options=options)
  assert found.shape == (1, 2, 2, keys)
  np.testing.assert_allclose(found.sum(axis=2), want, rtol=1e-5, atol=1e-6)
