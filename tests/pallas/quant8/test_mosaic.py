"""The fused step: interpreted on a CPU, lowered for CUDA, refused elsewhere."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.quant8 import mosaic, step
from isthmus.pallas.quant8.api import quantise, zeros
from isthmus.pallas.quant8.codec import decode
from isthmus.pallas.quant8.maps import NOZERO, ROOT, SIGNED, UNSIGNED, Map
from isthmus.pallas.quant8.ref import rates
from tests.jitted import jitted

codes_of = jitted(quantise)
values_of = jitted(decode)
needs_mosaic = pytest.mark.skipif(
  not has_mosaic(), reason="the kernel needs jax 0.11"
)
RATES = {"learning_rate": 0.1, "weight_decay": 0.01, "b2": 0.95}
ROWS = max(mosaic.TILE // 256, 4)
CASES = {
  "roots": {},
  "plain": {"second": UNSIGNED},
  "no zero": {"second": NOZERO},
  "linear": {"first": Map(kind="linear")},
  "updates": {"given": False},
  "bfloat16": {"dtype": jnp.bfloat16},
  "block of 1024": {"shape": (4, 1024), "block": 1024},
  "block of 128, rows across": {"shape": (32, 192), "block": 128, "axis": None},
}


@functools.cache
def case(
  shape=(8, 512),
  block=256,
  axis=-1,
  first=SIGNED,
  second=ROOT,
  dtype=jnp.float32,
  given=True,
):
  rng = np.random.default_rng(0)
  g, m, v, p = rng.standard_normal((4, *shape), np.float32)
  uneven = np.exp(2 * g)
  cut = {"block": block, "axis": axis}
  m = codes_of(0.1 * m * uneven, map=first, **cut)
  v = codes_of(np.square(v * uneven), map=second, **cut)
  g, p = (jnp.asarray(x.astype(dtype)) for x in (g, p))
  return g, m, v, rates(3, **RATES), p if given else None


def equals_the_reference(args, impl="mosaic"):
  *arrays, by, p = args
  got = jax.jit(lambda *x: step.adam(*x[:3], by, x[3], impl=impl))(*arrays, p)
  want = jax.jit(lambda *x: step.adam(*x, impl="xla"))(*args)
  low = got[0].dtype == jnp.bfloat16
  assert got[0].dtype == want[0].dtype
  np.testing.assert_allclose(
    got[0].astype(jnp.float32),
    want[0].astype(jnp.float32),
    **({"atol": 2e-2} if low else {"rtol": 1e-4, "atol": 1e-5}),
  )
  for x, y in zip(got[1:], want[1:], strict=True):
    assert (x.map, x.block, x.axis, x.dtype) == (
      y.map,
      y.block,
      y.axis,
      y.dtype,
    )
    np.testing.assert_allclose(x.absmax, y.absmax, rtol=1e-5)
    # Neighbouring codes at most, and those where a number lies between them.
    codes = [np.asarray(q.codes, np.int32) for q in (x, y)]
    off = np.abs(codes[0] - codes[1])
    assert off.mean() < 5e-3 and off.max() <= 1
    a, b = (values_of(c, x.map) for c in codes)
    assert (np.abs(a - b) <= 0.02).all()
  return True


@pytest.mark.once
@needs_mosaic
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
  with interpreted():
    assert equals_the_reference(case(**CASES[name]))


@pytest.mark.once
@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_on_gpu(name):
  assert equals_the_reference(case(**CASES[name]))


@pytest.mark.once
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["roots", "plain", "linear"])
def test_equals_the_reference_without_a_table(name, monkeypatch):
  monkeypatch.setattr(mosaic, "LOOKUP", False)
  assert equals_the_reference(case(**CASES[name]))


@needs_mosaic
@pytest.mark.parametrize("name", CASES)
def test_it_is_in_the_cuda_program_once(name):
  g, m, v, given, p = case(**CASES[name])
  f = jax.jit(lambda g, m, v, p: mosaic.adam(g, m, v, given, p))
  lowered = f.trace(g, m, v, p).lower(lowering_platforms=("cuda",))
  text = lowered.as_text()
  assert len(re.findall(r"custom_call @\w*mosaic_gpu\w*", text)) == 1
  assert "gather" not in text
  # Codes and scales of both moments, and parameters, are written in place.
  aliases = re.findall(r"#stablehlo\.output_operand_alias<", text)
  assert len(aliases) == (4 if p is None else 5)


@needs_mosaic
def test_parameters_of_one_size_are_lowered_once():
  g, m, v, given, p = case()

  def step(g, m, v, p):
    p, m, v = mosaic.adam(g, m, v, given, p)
    return mosaic.adam(2 * g, m, v, given, p)

  lowered = jax.jit(step).trace(g, m, v, p).lower(lowering_platforms=("cuda",))
  text = lowered.as_text()
  assert len(re.findall(r"custom_call @\w*mosaic_gpu\w*", text)) == 1


@pytest.mark.once
@needs_mosaic
@pytest.mark.parametrize(
  "how, said",
  [
    ({}, None),
    ({"axis": None}, None),
    ({"block": 2048, "shape": (4, 2048)}, "it takes blocks of (128,"),
    ({"block": 64}, "it takes blocks of (128,"),
    ({"axis": -2, "shape": (512, 8)}, "it takes blocks along the last axis"),
    ({"shape": (8, 300)}, "it takes whole blocks of 256, not 300"),
    ({"shape": (3, 256)}, f"it takes blocks of 256 by {ROWS}, not 3"),
    ({"shape": (0, 256)}, f"it takes blocks of 256 by {ROWS}, not 0"),
  ],
)
def test_what_is_refused(how, said):
  with interpreted():
    found = mosaic.refuse(*case(**how))
  assert found == said or (said and found.startswith(said))


@pytest.mark.once
def test_other_dtypes_are_refused():
  q = zeros((8, 512))
  g = jax.ShapeDtypeStruct((8, 512), jnp.int32)
  if has_mosaic():
    with interpreted():
      assert mosaic.refuse(g, q, q, None).startswith("it takes gradients of")


@pytest.mark.once
def test_a_machine_without_hopper_is_refused(monkeypatch):
  args = case()
  if has_mosaic():
    said = "it needs an NVIDIA Hopper GPU, and the platform is cpu"
    assert mosaic.refuse(*args) == said
    with pytest.raises(NotImplementedError, match=said):
      step.adam(*args, impl="mosaic")
  monkeypatch.setattr(mosaic, "refuse_machine", lambda: None)
  assert mosaic.refuse(*args) is None
