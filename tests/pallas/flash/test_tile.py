"""What the kernels share, as far as it can be seen outside of a kernel."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu

from isthmus.pallas.flash.lists import listed
from isthmus.pallas.flash.predicate import EMPTY, Band, Both, Positions
from isthmus.pallas.flash.tile import (
  BLOCK,
  Plan,
  accumulate,
  call,
  div,
  element_mask,
  entry,
  product,
  products,
  rem,
  tiled,
  wgmma,
)


def test_div_and_rem_stay_int32():
  with jax.enable_x64(True):
    for a, b in itertools.product((0, 1, 127, 128, 2**31 - 1), (1, 2, 128)):
      x = jnp.int32(a)
      assert (div(x, b), rem(x, b)) == (a // b, a % b)
      assert div(x, b).dtype == rem(x, b).dtype == jnp.int32


def test_entry_shares_axes_of_size_1():
  x = jnp.arange(6).reshape(1, 2, 3)
  assert entry(x, 5, 1, 2) == 5 and entry(x, 0, 0, 2) == 2
  assert entry(x.reshape(2, 1, 3), 1, 7, 0) == 3
  np.testing.assert_array_equal(entry(x, 9, 1), [3, 4, 5])


def test_a_plan_says_whether_tiles_are_masked():
  full = jnp.ones((1, 1, 1, 1), bool)
  whole, both = (
    listed(full, part, block=(BLOCK, BLOCK)) for part in (None, ~full)
  )
  lengths = (128, 128)
  assert not Plan(lengths).masked(None)
  assert Plan(lengths).masked(100)
  assert Plan(lengths, band=Band(None, 0)).masked(None)
  assert Plan(lengths, band=Band(0, None)).masked(None)
  assert not Plan(lengths, lists=whole).masked(100)
  assert Plan(lengths, lists=both).masked(None)


def test_a_plan_names_its_arrays():
  plan = Plan((1, 1), q=(jnp.zeros(3),), sinks=jnp.ones(2))
  found = plan.arrays()
  assert found["q"] is plan.q and found["sinks"] is plan.sinks
  assert {n for n, x in found.items() if x is None} == {"lists", "order"}
  assert len(jax.tree.leaves(found)) == 2


def test_interpreted_products_are_those_of_numpy():
  rng = np.random.default_rng(0)
  a, b, c = (
    jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16) for _ in range(3)
  )
  wide = [np.asarray(x, np.float64) for x in (a, b, c)]
  ab, ac = wide[0] @ wide[1], wide[0] @ wide[2]
  first, second = (lambda acc, x=x: wgmma(acc, a, x) for x in (b, c))
  start = jnp.full((8, 8), 3.0)
  with interpreted():
    alone = product((8, 8), first)
    added = accumulate(start, second)
    used, zero = products((8, 8), first, lambda x: -x, (8, 8), second)
    _, on = products((8, 8), first, lambda x: x, start, second)
  for found, want in (
    (alone, ab),
    (added, 3 + ac),
    (used, -ab),
    (zero, ac),
    (on, 3 + ac),
  ):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [0, 1])
def test_the_mask_of_a_tile_is_that_of_its_elements(queries):
  """In both orientations; operands are those of its batch row and heads."""
  rng = np.random.default_rng(0)
  t, length = 256, 200
  q = jnp.asarray(rng.integers(0, t, (1, 4, t)), jnp.int32)
  k = jnp.asarray(rng.integers(0, t, (2, 2, t)), jnp.int32)
  k = k.at[..., ::7].set(EMPTY)
  predicate = Both(Band(150, 90), Positions(None, 0))
  plan = Plan((t, t), q=(q,), k=(k,))
  base, at, shape = (64, 128), (1, 3, 1), (64, 128)

  def body(_, refs, out, scratch):
    seen = element_mask(
      refs,
      predicate,
      at,
      base,
      shape,
      queries=queries,
      length=length,
    )
    scratch[...] = jnp.where(seen, 1.0, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch, out)
    plgpu.wait_smem_to_gmem(0)

  if queries:
    base = (base[1], base[0])
  with interpreted():
    (found,) = call(
      lambda x, refs, out, scratch: body(x, refs, out, scratch[0]),
      (jnp.zeros((8, 128), jnp.bfloat16),),
      plan,
      out_type=(jax.ShapeDtypeStruct(shape, jnp.bfloat16),),
      scratch=(tiled(shape, jnp.bfloat16),),
      items=1,
      threads=1,
      name="mask",
    )
  sizes = (shape[queries], shape[1 - queries])
  i = base[0] + np.arange(sizes[0])[:, None]
  j = base[1] + np.arange(sizes[1])
  p, r = np.asarray(q)[0, 3][i], np.asarray(k)[1, 1][j]
  want = (j >= i - 150) & (j <= i + 90) & (r <= p) & (r != EMPTY)
  want &= j < length
  assert want.any() and not want.all()
  found = np.asarray(found, bool)
  np.testing.assert_array_equal(found.T if queries else found, want)
