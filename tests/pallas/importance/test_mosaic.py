"""Importance by the kernel: interpreted on a CPU, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.importance import mosaic, ref
from isthmus.pallas.importance.api import Options
from tests.attention.oracle import inputs
from tests.pallas.importance.cases import CASES, check, check_blind

pytestmark = pytest.mark.once

needs_mosaic = pytest.mark.skipif(
  not has_mosaic(), reason="the kernel needs jax 0.11"
)


@needs_mosaic
@pytest.mark.parametrize("name", CASES)
def test_equals_all_sums(name):
  with interpreted():
    assert check(mosaic.importance, name, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_equals_all_sums_on_gpu(name):
  assert check(mosaic.importance, name, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("d", [64, 128, 192, 256])
def test_long_rows_on_gpu(d, dtype):
  """Many walks, and the same bits each time."""
  q, k, *_ = inputs(1, 128, 9000, 4, 2, d, dtype=dtype)
  options = Options(scale=d**-0.5)
  lse = jax.random.normal(jax.random.key(1), (1, 4, 128)) + 8
  f = jax.jit(lambda *x: mosaic.importance(*x, options=options))
  found = f(q, k, lse)
  wide = (x.astype(jnp.float32) for x in (q, k))
  want = ref.importance(*wide, lse, options=options)
  np.testing.assert_allclose(found, want, atol=1e-6, rtol=1e-4)
  for _ in range(20):
    assert (f(q, k, lse) == found).all()


@needs_mosaic
@pytest.mark.parametrize("causal", [True, False])
def test_it_lowers_for_a_gpu(causal):
  q = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, 4096, 2, 128), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 2, 128), jnp.float32)
  f = jax.jit(lambda *a: mosaic.importance(*a, options=Options(causal)))
  text = f.trace(q, k, lse).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("importance") >= 1 and "128x4096" not in text


@needs_mosaic
def test_layers_alike_are_lowered_once():
  x = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 2, 1024), jnp.float32)
  one = lambda *a: mosaic.importance(*a, options=Options())
  f = jax.jit(lambda x, y, lse: one(x, y, lse) + one(y, x, lse))
  text = f.trace(x, x, lse).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 1


@needs_mosaic
def test_what_is_refused():
  x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.float32)
  with interpreted():
    said = mosaic.refuse(x, x, None, options=Options())
  assert said == "it takes bfloat16 and float16, not float32"


@needs_mosaic
def test_a_query_that_sees_nothing_gives_nothing():
  with interpreted():
    assert check_blind(mosaic.importance, jnp.bfloat16)


def test_a_machine_without_hopper_is_refused(monkeypatch):
  x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
  assert "it needs" in mosaic.refuse(x, x, None, options=Options())
  monkeypatch.setattr(mosaic, "refuse_machine", lambda: None)
  assert mosaic.refuse(x, x, None, options=Options()) is None
