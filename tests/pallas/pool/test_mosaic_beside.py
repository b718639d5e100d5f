"""Blocks that a kernel's spare warpgroup pools, by itself and beside a copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from jax import lax

from isthmus.pallas.pool.mosaic_beside import Pooling, beside, launch_beside
from isthmus.pallas.pool.ref import pool_blocks
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once


@pytest.mark.parametrize("items", [1, 7, 128, 5000])
def test_every_block_is_somebodys(items):
  pooling = Pooling((2, 1300, 3, 64), items)
  assert pooling.blocks == 2 * 10 * 3
  found = {
    tuple(int(x) for x in pooling.place(jnp.int32(item), jnp.int32(index)))
    for item in range(min(items, 60))
    for index in range(pooling.share)
  }
  assert found == {
    (b, m, n) for b in range(2) for m in range(10) for n in range(3)
  }


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("items, total", [(1, 3), (4, 1), (4, 9), (4, 0)])
def test_between_steps_of_something_else(items, total, d):
  """More blocks than steps, fewer, and no step at all."""
  x, *_ = inputs(1, 700, 1, 3, 3, d, dtype=jnp.bfloat16)
  pooling = Pooling(x.shape, items)

  def body(y_ref, z_ref, refs):
    item = lax.axis_index("item")

    def step(turn):
      z_ref[item, turn] = y_ref[item, turn] + 1

    beside(pooling, refs, item, total, max(total, 1), step)

  y = jnp.arange(items * 10, dtype=jnp.int32).reshape(items, 10)
  run = lambda x, y: launch_beside(
    body,
    (y,),
    x,
    pooling,
    out_type=(jax.ShapeDtypeStruct(y.shape, y.dtype),),
    scratch=(),
    items=items,
    threads=1,
    name="copy",
  )
  with interpreted():
    z, means = jax.jit(run)(x, y)
  np.testing.assert_array_equal(z[:, :total], y[:, :total] + 1)
  want = pool_blocks(x[:, :640], 128)
  np.testing.assert_allclose(
    np.asarray(means, np.float32), np.asarray(want, np.float32), rtol=2**-8
  )
