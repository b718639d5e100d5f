"""The unit of a ring's work, without a ring."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.merge import merge
from isthmus.attention.pair import Setting, Tokens, attend, pull
from isthmus.attention.zigzag import spread
from tests.attention.oracle import by_hand, inputs

pytestmark = pytest.mark.once

SETTINGS = [
  {"layout": "contiguous"},
  {"layout": "contiguous", "causal": True},
  {"layout": "zigzag", "causal": True},
  {"layout": "zigzag", "causal": True, "window": (5, 0)},
  {"layout": "contiguous", "window": (4, 2)},
]


def near(got, want):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_pairs_add_up(settings):
  """All pairs of three devices: what one call gives, values and gradients."""
  devices, size = 3, 4
  setting = Setting("seq", devices, "kv_ring", **settings)
  q, k, v, do, dlse = inputs(1, 12, 12, 4, 2, 8)
  places = np.stack(
    [spread(r, devices, setting.layout, size) for r in range(devices)]
  )
  left, right = setting.limits
  far = np.arange(12)[:, None] - np.arange(12)
  mask = np.ones(far.shape, bool)
  mask &= True if left is None else far <= left
  mask &= True if right is None else far >= -right
  (o, lse), grads = by_hand((q, k, v), do, dlse, mask)
  delta = jnp.sum(do * o, axis=-1).swapaxes(1, 2) - dlse
  total = [jnp.zeros_like(x) for x in (q, k, v)]

  @functools.partial(jax.jit, static_argnames="same")
  def run(mine, theirs, r, c, same):
    call = {"who": (Tokens(), Tokens()), "ranks": (r, c), "same": same}
    part = attend(setting, *mine[:1], *theirs, **call)
    return part, pull(setting, *mine[:1], *theirs, mine[1:], **call)

  for r in range(devices):
    at, found = places[r], None
    mine = (q[:, at], do[:, at], lse[..., at], delta[..., at])
    for c in range(devices):
      to = places[c]
      part, more = run(mine, (k[:, to], v[:, to]), r, c, same=r == c)
      found = part if found is None else merge(*found, *part)
      for i, (x, where) in enumerate(zip(more, (at, to, to), strict=True)):
        total[i] = total[i].at[:, where].add(x)
    near(found, (o[:, at], lse[..., at]))
  near(total, grads)


def test_what_nobody_sees_is_not_computed():
  """A pair that shares no position, no segment, no block: a branch, zeros."""
  q, k, v, *_ = inputs(1, 4, 4, 2, 2, 4)
  nan = jnp.full_like(k, jnp.nan)
  far = jnp.arange(4, dtype=jnp.int32)[None] + 100
  one, two = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32)
  near_ = far - 100
  blocks = jnp.zeros((1, 1, 4, 4), bool)
  plain = {"axis": "seq", "devices": 2, "schedule": "kv_ring"}
  plain["layout"] = "contiguous"
  for settings, who, seen in (
    ({"window": (3, 3)}, (Tokens(None, near_), Tokens(None, far)), None),
    ({}, (Tokens(one), Tokens(two)), None),
    ({"causal": True}, (Tokens(), Tokens()), None),
    ({"block": (2, 2)}, (Tokens(), Tokens()), blocks),
  ):
    setting = Setting(**plain, **settings)

    def run(q, k, v, who, seen, setting=setting):
      return attend(setting, q, k, v, who, (0, 1), seen)

    o, lse = jax.jit(run)(q, nan, nan, who, seen)
    assert not o.any() and jnp.isneginf(lse).all()
    assert "cond[" in str(jax.make_jaxpr(run)(q, k, v, who, seen))


def test_without_conditions_there_is_no_branch():
  q, k, v, *_ = inputs(1, 4, 4, 2, 2, 4)
  setting = Setting("seq", 2, "kv_ring", "contiguous")
  text = jax.make_jaxpr(
    lambda *x: attend(setting, *x, (Tokens(), Tokens()), (0, 1))
  )(q, k, v)
  assert "cond[" not in str(text)


def test_gradients_hold_no_forward_pass():
  """Five products of a pair, and one exponential; a forward has two more."""
  q, k, v, do, dlse = inputs(1, 4, 4, 2, 2, 4)
  setting = Setting("seq", 2, "kv_ring", "contiguous", causal=True)
  who = Tokens(), Tokens()

  def run(q, k, v, *back):
    return pull(setting, q, k, v, back, who, (0, 0), same=True)

  text = str(jax.make_jaxpr(run)(q, k, v, do, dlse, dlse))
  assert text.count("dot_general[") == 5
  assert len(re.findall(r"= exp\b", text)) == 1


@pytest.mark.parametrize("window, masked", [(None, False), ((9, 0), True)])
def test_a_causal_zigzag_has_no_mask_but_at_home(window, masked):
  """Halves are chosen, no position is compared."""
  q, k, v, *_ = inputs(1, 4, 4, 2, 2, 4)
  setting = Setting("seq", 4, "kv_ring", "zigzag", causal=True, window=window)

  def run(q, k, v, ranks):
    return attend(setting, q, k, v, (Tokens(), Tokens()), ranks)

  text = str(jax.make_jaxpr(run)(q, k, v, (1, 2)))
  assert ("iota[" in text) == masked
  for r, c in itertools.permutations(range(4), 2):
    _, lse = jax.jit(run)(q, k, v, (r, c))
    want = [not masked and c > r] * 2 + [False] * 2
    assert (jnp.isneginf(lse).all((0, 1)) == np.array(want)).all() or masked
