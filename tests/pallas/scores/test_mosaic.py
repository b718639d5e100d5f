"""Reduced scores by the kernel: interpreted on a CPU, and on a GPU."""

import jax
import jax.numpy as jnp
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.scores import mosaic
from isthmus.pallas.scores.api import Options
from tests.pallas.scores.cases import CASES, check

pytestmark = pytest.mark.once

needs_mosaic = pytest.mark.skipif(
  not has_mosaic(), reason="the kernel needs jax 0.11"
)


@needs_mosaic
@pytest.mark.parametrize("name", CASES)
def test_equals_all_scores(name):
  with interpreted():
    assert check(mosaic.reduce_scores, name, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_equals_all_scores_on_gpu(name):
  assert check(mosaic.reduce_scores, name, jnp.bfloat16)


@needs_mosaic
@pytest.mark.parametrize("side", [8, 32, 128])
@pytest.mark.parametrize("queries", ["rows", "columns"])
def test_it_lowers_for_a_gpu(side, queries):
  x = jax.ShapeDtypeStruct((1, 4096, 2, 128), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 2, 4096), jnp.float32)
  options = Options(side, "sum", queries)
  f = jax.jit(lambda *a: mosaic.reduce_scores(*a, options=options))
  text = f.trace(x, x, lse).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("reduce_scores") >= 1 and "4096x4096" not in text


@needs_mosaic
def test_layers_alike_are_lowered_once():
  x = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 2, 1024), jnp.float32)
  one = lambda *a: mosaic.reduce_scores(*a, options=Options(32))
  f = jax.jit(lambda x, y, lse: one(x, y, lse) + one(y, x, lse))
  text = f.trace(x, x, lse).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 1


@needs_mosaic
@pytest.mark.parametrize(
  "dtype, d, side, said",
  [
    (jnp.float32, 64, 32, "it takes bfloat16 and float16, not float32"),
    (jnp.bfloat16, 300, 32, "it takes widths up to 256, not 300"),
    (jnp.bfloat16, 64, 4, "it takes sides of multiples of 8, not 4"),
    (jnp.float16, 64, 8, None),
  ],
)
def test_what_is_refused(dtype, d, side, said):
  x = jax.ShapeDtypeStruct((1, 128, 2, d), dtype)
  with interpreted():
    assert mosaic.refuse(x, x, None, options=Options(side)) == said


def test_a_machine_without_hopper_is_refused(monkeypatch):
  x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
  assert "it needs" in mosaic.refuse(x, x, None, options=Options(32))
  monkeypatch.setattr(mosaic, "refuse_machine", lambda: None)
  assert mosaic.refuse(x, x, None, options=Options(32)) is None
