"""Each item is taken by one CTA, and CTAs take about as much."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from isthmus.pallas.flash.items import chunk, each_item, rounds
from isthmus.pallas.flash.tile import launch


def test_a_cta_takes_several_items_only_if_they_are_short():
  """And only if that many rounds of 132 CTAs leave at most a tenth idle."""
  several = 0
  for items, steps in itertools.product((1, 9, 400, 1000, 4096, 65536), (1, 9)):
    each = chunk(items, steps)
    ctas = -(-items // each)
    assert rounds(ctas) == -(-ctas // 132)
    assert each * steps <= 64
    if each > 1:
      several += 1
      assert rounds(ctas) * 132 * each <= 1.1 * items
    assert chunk(items, 64) == chunk(items, float("inf")) == 1
  assert several > 5 and chunk(400, 1) == chunk(132, 1) == 1
  assert chunk(4096, 16) == chunk(65536, 16) == 4 and chunk(4096, 0) > 30


@pytest.mark.parametrize(
  "items, each", [(5, 1), (10, 4), (5, 4), (7, 7), (16, 2), (1, 3)]
)
def test_each_item_is_taken_once(items, each):
  """In rounds of opposite order, each CTA counting on from what it has done."""
  ctas = -(-items // each)

  def body(x, found, order):
    cta = jax.lax.axis_index("item")

    def one(i, item, done):
      found[item] = cta
      order[item] = done
      return done + 1 + 10 * i

    each_item(items, each, one)

  shape = jax.ShapeDtypeStruct((items,), jnp.int32)
  with interpreted():
    found, order = launch(
      body,
      (jnp.zeros(1),),
      out_type=(shape, shape),
      scratch=(),
      items=ctas,
      threads=1,
      name="items",
    )
  forth, back = np.arange(ctas), np.arange(ctas)[::-1]
  rounds = [back if i % 2 else forth for i in range(each)]
  assert found.tolist() == np.concatenate(rounds)[:items].tolist()
  done = [0, 1, 12, 33, 64, 105, 156]
  assert order.tolist() == [done[i // ctas] for i in range(items)]
