"""Reduced logits by the kernel: interpreted on a CPU, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas import hopper
from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.scores import mosaic, ref
from isthmus.pallas.scores.api import Options
from tests.attention.oracle import inputs
from tests.pallas.scores.cases import CASES, check, check_pooled

pytestmark = pytest.mark.once

needs_mosaic = pytest.mark.skipif(
  not has_mosaic(), reason="the kernel needs jax 0.11"
)


@needs_mosaic
@pytest.mark.parametrize("name", CASES)
def test_equals_all_logits(name):
  with interpreted():
    assert check(mosaic.reduce_logits, name, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_equals_all_logits_on_gpu(name):
  assert check(mosaic.reduce_logits, name, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("d", [64, 128, 192, 256])
def test_long_rows_on_gpu(d, dtype):
  """Walks of many tiles, and the same bits each time."""
  q, k, *_ = inputs(1, 700, 9000, 4, 2, d, dtype=dtype)
  for options in (
    Options(32, scale=d**-0.5),
    Options(128, "sum"),
    Options(128, "none"),
  ):
    f = jax.jit(lambda q, k, o=options: mosaic.reduce_logits(q, k, options=o))
    found = f(q, k)
    want = ref.reduce_logits(
      *(x.astype(jnp.float32) for x in (q, k)), options=options
    )
    some = slice(options.reduce == "none", None)
    for x, y in zip(found[some], want[some], strict=True):
      np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-5)
    for _ in range(20):
      for x, y in zip(f(q, k)[some], found[some], strict=True):
        assert (x == y).all()


# More blocks than warpgroups that pool, fewer, a last one that is short, and
# what the kernel leaves to XLA: other widths, no whole block, other numbers.
POOLED = [
  ((2, 300, 2, 128), "none"),  # as many heads of keys: two warpgroups
  ((1, 700, 4, 64), "none"),
  ((1, 300, 4, 40), "none"),
  ((1, 100, 2, 64), "none"),
  ((1, 300, 4, 64), "sum"),
]


@needs_mosaic
@pytest.mark.parametrize("shape, reduce", POOLED)
def test_blocks_are_pooled_besides(shape, reduce, monkeypatch):
  monkeypatch.setattr(hopper, "PROCESSORS", 5)
  jax.clear_caches()
  with interpreted():
    run = mosaic.reduce_logits
    assert check_pooled(run, shape, jnp.bfloat16, reduce=reduce, rows=70)
  jax.clear_caches()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
  "shape, reduce",
  [*POOLED, ((1, 32768, 32, 128), "none"), ((2, 9000, 12, 64), "none")],
)
def test_blocks_are_pooled_besides_on_gpu(shape, reduce, dtype):
  run = mosaic.reduce_logits
  assert check_pooled(run, shape, dtype, reduce=reduce, repeats=20)


@needs_mosaic
def test_it_lowers_alone_beside_the_most_numbers():
  """For pooling there is no memory then."""
  x = jax.ShapeDtypeStruct((1, 4096, 4, 128), jnp.bfloat16)
  f = lambda x: mosaic.reduce_logits(x, x, options=Options(8), tokens=x)
  text = jax.jit(f).trace(x).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 1


@needs_mosaic
@pytest.mark.parametrize("d", [64, 128])
def test_what_pools_is_lowered_as_the_kernel(d):
  """XLA reads the tokens for the last ones alone."""
  x = jax.ShapeDtypeStruct((1, 4096, 4, d), jnp.bfloat16)
  options = Options(128, "none", causal=False)
  f = lambda x: mosaic.reduce_logits(x[:, -128:], x, options=options, tokens=x)
  text = jax.jit(f).trace(x).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 1
  assert "stablehlo.reduce" in text and f"32x128x4x{d}" not in text


@needs_mosaic
@pytest.mark.parametrize("side", [8, 32, 128])
@pytest.mark.parametrize("reduce", ["max", "sum", "none"])
def test_it_lowers_for_a_gpu(side, reduce):
  x = jax.ShapeDtypeStruct((1, 4096, 2, 128), jnp.bfloat16)
  options = Options(side, reduce)
  f = jax.jit(lambda *a: mosaic.reduce_logits(*a, options=options))
  text = f.trace(x, x).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("reduce_logits") >= 1 and "4096x4096" not in text


@needs_mosaic
def test_layers_alike_are_lowered_once():
  x = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
  one = lambda *a: mosaic.reduce_logits(*a, options=Options(32))[0]
  f = jax.jit(lambda q, k: one(q, k) + one(k, q))
  text = f.trace(x, x).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 1


@needs_mosaic
@pytest.mark.parametrize(
  "dtype, side, said",
  [
    (jnp.float32, 32, "it takes bfloat16 and float16, not float32"),
    (jnp.bfloat16, 4, "it takes sides of multiples of 8, not 4"),
    (jnp.float16, 8, None),
  ],
)
def test_what_is_refused(dtype, side, said):
  x = jax.ShapeDtypeStruct((1, 128, 2, 64), dtype)
  with interpreted():
    assert mosaic.refuse(x, x, options=Options(side)) == said


def test_a_machine_without_hopper_is_refused(monkeypatch):
  x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
  assert "it needs" in mosaic.refuse(x, x, options=Options(32))
  monkeypatch.setattr(mosaic, "refuse_machine", lambda: None)
  assert mosaic.refuse(x, x, options=Options(32)) is None


@needs_mosaic
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_turn_or_lose_the_order_are_refused(scale):
  x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
  with interpreted():
    said = mosaic.refuse(x, x, options=Options(8, scale=scale))
  assert said == f"it takes scales above 0, not {scale}"
