"""Inverted choices against lists that loops make."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.moba import invert as module
from isthmus.pallas.moba.invert import invert, tiles

pytestmark = pytest.mark.once

EXTREMES = (-(2**31), 2**31 - 1, -1)


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def platform(request, monkeypatch):
  """The second sort of a GPU runs anywhere."""
  monkeypatch.setattr(module, "platform", lambda: request.param)
  invert.clear_cache()
  yield request.param
  invert.clear_cache()


def lists(choice, g):
  """[(row, slot)] of each block."""
  found = [[] for _ in range(g)]
  for row, slot in np.ndindex(choice.shape):
    if 0 <= choice[row, slot] < g:
      found[choice[row, slot]].append((row, slot))
  return found


def case(name, r=23, c=3, g=7):
  rng = np.random.default_rng(0)
  choice = rng.integers(0, g, (r, c))
  if name == "empty blocks":
    choice = choice // 3 * 3
  if name == "one block":
    choice[:] = g - 1
  if name == "nothing":
    choice[:] = -1
  if name == "extremes":
    choice = rng.choice([*EXTREMES, 0, g - 1, g], (r, c))
  return choice.astype(np.int32)


CASES = ("any", "empty blocks", "one block", "nothing", "extremes")


@pytest.mark.parametrize("name", CASES)
def test_lists_of_blocks(name):
  choice = case(name)
  found = invert(jnp.asarray(choice), 7)
  want = lists(choice, 7)
  assert all(x.dtype == jnp.int32 for x in found)
  for j in range(7):
    order = found.order[found.offset[j] : found.offset[j + 1]]
    pairs = [(int(x) // 3, int(x) % 3) for x in order]
    assert pairs == want[j]
    assert (found.block[found.offset[j] : found.offset[j + 1]] == j).all()
  assert found.offset[0] == 0 and found.offset[-1] == sum(map(len, want))
  np.testing.assert_array_equal(
    found.order[found.place], np.arange(choice.size)
  )


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("name", CASES)
def test_tiles_cover_each_choice_once(name, size):
  choice = case(name)
  inverted = invert(jnp.asarray(choice), 7)
  found = tiles(inverted, size=size)
  want = [
    (j, i)
    for j, entries in enumerate(lists(choice, 7))
    for i in range(0, len(entries), size)
  ]
  assert found.total == len(want) <= len(found.block)
  met = []
  for i, (block, begin, count) in enumerate(zip(*found[:3], strict=True)):
    if i >= len(want):
      assert count == 0
      continue
    assert block == want[i][0] and 0 < count <= size
    met += range(int(begin), int(begin + count))
    assert (inverted.block[begin : begin + count] == block).all()
  assert met == list(range(int(inverted.offset[-1])))


def test_leading_axes_are_apart():
  choice = np.stack([case(name) for name in CASES])[:, None]
  many = invert(jnp.asarray(choice), 7)
  cut = tiles(many, size=4)
  for i in range(len(CASES)):
    one = invert(jnp.asarray(choice[i, 0]), 7)
    for x, y in zip(many, one, strict=True):
      np.testing.assert_array_equal(x[i, 0], y)
    for x, y in zip(cut, tiles(one, size=4), strict=True):
      np.testing.assert_array_equal(x[i, 0], y)


def test_no_order_is_left_to_the_machine(platform):
  """Scattered are numbers to places of their own, or sums of whole ones."""
  choice = jax.ShapeDtypeStruct((2, 64, 4), jnp.int32)
  text = invert.lower(choice, 9).as_text()
  sorts = 2 if platform == "gpu" else 1
  assert text.count("is_stable = true") == sorts
  found = re.findall(r'"stablehlo.scatter".*?-> tensor<\S+>', text, re.S)
  assert len(found) == 3 - sorts
  for one in found:
    assert "tensor<f" not in one
    assert "stablehlo.add" in one or "unique_indices = true" in one


def test_numbers_are_counted_below_each():
  x = np.array([[2, 0, 2, -1, 3, 7], [3, 3, 3, 0, 1, 2]], np.int32)
  want = [[(row[row >= 0] < i).sum() for i in range(4)] for row in x]
  np.testing.assert_array_equal(module.count_below(jnp.asarray(x), 3), want)
