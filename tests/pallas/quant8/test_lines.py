"""A block a line: what can be read so, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.quant8.api import dequantise, quantise, zeros
from isthmus.pallas.quant8.lines import line_by_line, refuse_lines, with_parts

pytestmark = pytest.mark.once


@pytest.mark.parametrize("axis", [-1, None])
def test_there_and_back(axis):
  x = jax.random.normal(jax.random.key(0), (3, 512))
  q = quantise(x, block=128, axis=axis)
  codes, scales = line_by_line(q.codes, 128), q.absmax.reshape(-1)
  assert codes.shape == (12, 128) and scales.shape == (12,)
  again = with_parts(zeros((3, 512), block=128, axis=axis), codes, scales)
  np.testing.assert_array_equal(dequantise(again), dequantise(q))
  # A line is a block: its scale is its largest number.
  np.testing.assert_array_equal(scales, jnp.abs(x).reshape(12, 128).max(1))


@pytest.mark.parametrize(
  "shape, how, dtype, said",
  [
    ((8, 512), {}, "float32", None),
    ((3, 171, 2), {"block": 2, "axis": None}, "float16", None),
    ((8, 300), {}, "float32", "it takes whole blocks of 256, not 300 numbers"),
    ((512, 8), {"axis": -2}, "float32", "it takes blocks along the last axis"),
    ((8, 512), {}, "int32", "it takes gradients of float32, bfloat16"),
  ],
)
def test_what_is_refused(shape, how, dtype, said):
  g = jax.ShapeDtypeStruct(shape, dtype)
  found = refuse_lines(g, zeros(shape, **how))
  assert found == said or (said and found.startswith(said))
  if dtype != "int32" and said is None:
    whole = jax.ShapeDtypeStruct(shape, jnp.int8)
    found = refuse_lines(g, zeros(shape, **how), whole)
    assert found.startswith("it takes parameters of float32")
