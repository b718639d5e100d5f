"""Arrays that move between eight devices, against numpy."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from isthmus.attention.pair import Setting
from isthmus.attention.schedule import Hops
from isthmus.attention.travel import (
  gather,
  scatter,
  to_heads,
  to_tokens,
  tour,
  turn,
)
from isthmus.attention.zigzag import zigzag

pytestmark = pytest.mark.once

SPEC = P(None, "seq")


def run(function, x, out=SPEC):
  """`function` of the tokens of four devices."""
  mesh = Mesh(np.array(jax.devices()[:4]), "seq")
  call = jax.shard_map(function, mesh=mesh, in_specs=SPEC, out_specs=out)
  return np.asarray(jax.jit(call)(x))


TOKENS = np.arange(2 * 16 * 4).reshape(2, 16, 4)


@pytest.mark.parametrize("by", [1, -1, 3, 4])
def test_turn(by):
  got = run(lambda x: turn("seq", {"x": x}, by)["x"], TOKENS)
  np.testing.assert_array_equal(got, np.roll(TOKENS, 4 * by, axis=1))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
  "plan, ways",
  [
    (Hops((1, 2, 3), 3, 0), [(1, 1), (1, 2), (1, 3)]),
    (Hops((1, 3), 1, 1), [(1, 1), (-1, -1)]),
    (Hops((1, 2, 3), 1, 1, True), [(1, 1), (-1, -1), (0, 2)]),
  ],
)
def test_tour(plan, ways, reverse):
  """What comes by is that of device r - shift, whole."""
  found = []

  def visit(x):
    seen = list(tour("seq", x, plan, reverse=reverse))
    found.append([(way, shift) for way, shift, _ in seen])
    return tuple(y for *_, y in seen)

  mesh = Mesh(np.array(jax.devices()[:4]), "seq")
  call = jax.shard_map(visit, mesh=mesh, in_specs=SPEC, out_specs=SPEC)
  x = np.arange(2 * 12).reshape(2, 12)  # 3 tokens a device: uneven halves
  for y, (_, shift) in zip(jax.jit(call)(x), ways, strict=True):
    by = -shift if reverse else shift
    np.testing.assert_array_equal(y, np.roll(x, 3 * by, axis=1))
  assert found[-1] == ways


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_all_at_once(layout):
  """Gathered in order; its adjoint; heads for tokens, and back."""
  setting = Setting("seq", 4, "all_gather", layout)
  x = zigzag(TOKENS, 4) if layout == "zigzag" else TOKENS
  whole = run(lambda x: gather(setting, x), x, out=P("seq"))
  np.testing.assert_array_equal(whole, np.tile(TOKENS, (4, 1, 1)))
  got = run(lambda x: scatter(setting, gather(setting, x)), x)
  np.testing.assert_array_equal(got, 4 * x)
  heads = run(lambda x: to_heads(setting, x), x, out=P(None, None, "seq"))
  np.testing.assert_array_equal(heads, TOKENS)
  got = run(lambda x: to_tokens(setting, to_heads(setting, x)), x)
  np.testing.assert_array_equal(got, x)
