"""The best of each row by the kernel: interpreted on a CPU, and on a GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.keep import mosaic, ref
from isthmus.pallas.keep.api import Options
from tests.pallas.keep.cases import CASES, check, listed

needs_mosaic = pytest.mark.skipif(
  not has_mosaic(), reason="the kernel needs jax 0.11"
)


@pytest.mark.once
@needs_mosaic
@pytest.mark.parametrize("name", CASES)
def test_as_by_sorting(name):
  with interpreted():
    assert check(mosaic.keep, name)


@pytest.mark.once
@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_as_by_sorting_on_gpu(name):
  assert check(mosaic.keep, name)


@pytest.mark.once
@pytest.mark.gpu
@pytest.mark.parametrize("weigh", ["one", "value", "softmax"])
@pytest.mark.parametrize("m", [1000, mosaic.MOST])
def test_long_rows_on_gpu(weigh, m):
  """A sum's order may move an end by a block where it rounds."""
  x = jnp.exp(jax.random.normal(jax.random.key(0), (8, 512, m)))
  limit = jnp.linspace(0, m, 512).astype(jnp.int32)
  target = {"one": m // 9, "value": 0.5 * m, "softmax": 0.9}[weigh]
  args = x, jnp.full((8, 512), target), limit, jnp.int32(3), limit - 1
  run = jax.jit(lambda *a: mosaic.keep(*a, options=Options(weigh)))
  found = run(*args)
  want = jax.jit(lambda *a: ref.keep(*a, options=Options(weigh)))(*args)
  off = (listed(*found) != listed(*want)).sum(-1)
  assert off.max() <= (0 if weigh == "one" else 1) and (off > 0).mean() < 0.01
  for _ in range(3):
    again = run(*args)
    for a, b in zip(again, found, strict=True):
      np.testing.assert_array_equal(a, b)


@needs_mosaic
@pytest.mark.parametrize("weigh", ["one", "value", "softmax"])
def test_it_is_in_the_cuda_program_once(weigh):
  shape = jax.ShapeDtypeStruct
  args = (
    shape((2, 1, 64, 2048), jnp.float32),
    shape((2, 4, 64), jnp.float32),
    *(shape((64,), jnp.int32),) * 3,
  )
  f = jax.jit(lambda *a: mosaic.keep(*a, options=Options(weigh)))
  text = f.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  assert len(re.findall(r"custom_call @\w*mosaic_gpu\w*", text)) == 1
  # One copy of a group's scores is read for all its targets.
  assert "2x4x64x2048xf32" not in text and "512x2048xf32" not in text


@needs_mosaic
def test_layers_alike_are_lowered_once():
  x = jax.ShapeDtypeStruct((1, 1, 8, 1024), jnp.float32)
  target = jax.ShapeDtypeStruct((1, 1, 8), jnp.float32)
  limit = jax.ShapeDtypeStruct((8,), jnp.int32)
  one = lambda *a: mosaic.keep(*a, options=Options("value"))
  f = jax.jit(lambda x, *a: (one(x, *a), one(2 * x, *a)))
  args = x, target, limit, limit, limit
  text = f.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  assert len(re.findall(r"custom_call @\w*mosaic_gpu\w*", text)) == 1


@needs_mosaic
def test_arguments_of_numpy_stay_constants():
  x = jax.ShapeDtypeStruct((2, 8, 256), jnp.float32)
  run = lambda x, *a: mosaic.keep(x, *a, options=Options("one"))
  args = [np.full(8, 3, np.int32)] * 4
  traced = jax.make_jaxpr(run)(x, *map(jnp.asarray, args)).eqns
  known = jax.make_jaxpr(lambda x: run(x, *args))(x).eqns
  made = lambda eqns: [y.aval.shape for e in eqns for y in e.outvars]
  assert (16,) in made(traced[:-3]) and (16,) not in made(known[:-3])


@pytest.mark.once
@needs_mosaic
@pytest.mark.parametrize(
  "shape, dtype, said",
  [
    ((8, 4096), jnp.float32, None),
    ((8, 5000), jnp.float32, "it takes rows of up to 4096, not 5000"),
    ((0, 8), jnp.float32, "it takes no empty arrays: (0, 8)"),
    ((8, 8), jnp.int32, "it takes float32 and shorter, not int32"),
  ],
)
def test_what_is_refused(shape, dtype, said):
  x = jax.ShapeDtypeStruct(shape, dtype)
  with interpreted():
    assert mosaic.refuse(x, options=Options("one")) == said


@pytest.mark.once
def test_a_machine_without_hopper_is_refused(monkeypatch):
  x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
  if has_mosaic():
    said = "it needs an NVIDIA Hopper GPU, and the platform is cpu"
    assert mosaic.refuse(x, options=Options("one")) == said
  monkeypatch.setattr(mosaic, "refuse_machine", lambda: None)
  assert mosaic.refuse(x, options=Options("one")) is None
