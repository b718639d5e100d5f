"""Attention divided over devices equals that of one, values and gradients."""

import dataclasses
import functools
import itertools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from isthmus.attention import (
  EMPTY,
  BlockMask,
  ring_attention,
  save_attention,
)
from isthmus.attention.schedule import SCHEDULES
from isthmus.attention.zigzag import unzigzag, zigzag
from tests.attention.cover import pairs
from tests.attention.oracle import by_hand, check, dense_mask, inputs, segments

pytestmark = pytest.mark.once

B, T = 2, 48
TOKENS, ROWS = P(None, "seq"), P(None, None, "seq")


@dataclasses.dataclass(frozen=True)
class Case:
  """A call; (n, k) are query heads and kv heads."""

  devices: int
  schedule: str
  heads: tuple[int, int]
  causal: bool
  layout: str
  ids: bool
  dtype: str

  def __str__(self):
    return "-".join(
      (
        f"{self.schedule}-{self.devices}-{'x'.join(map(str, self.heads))}",
        self.layout,
        *["causal"] * self.causal,
        *["segments"] * self.ids,
        self.dtype,
      )
    )


def takes(case):
  n, k = case.heads
  whole = not (n % case.devices or k % case.devices)
  return whole or case.schedule != "ulysses"


def cover(seed=0):
  """Few cases in which each two settings that go together occur."""
  whole = [
    values
    for values in itertools.product(
      (8, 4, 2, 1),
      SCHEDULES,
      ((8, 8), (8, 2), (8, 1)),
      (True, False),
      ("zigzag", "contiguous"),
      (True, False),
      ("float32", "bfloat16"),
    )
    if takes(Case(*values))
  ]
  random.Random(seed).shuffle(whole)
  left, found = {pair for values in whole for pair in pairs(values)}, []
  while left:
    best = max(whole, key=lambda values: len(left & pairs(values)))
    left -= pairs(best)
    found.append(Case(*best))
  return found


def divided(devices, layout="contiguous", names=("seq",), **settings):
  """`ring_attention` as a function of whole arrays in their own order.

  Of (q, k, v), and of others by name; jitted.
  """
  mesh = Mesh(np.array(jax.devices()[:devices]), names)

  def run(q, k, v, given):
    o, lse = ring_attention(
      q, k, v, layout=layout, return_lse=True, **given, **settings
    )
    return o, lse

  def there(x, axis=1):
    return zigzag(x, devices, axis) if layout == "zigzag" else x

  def back(x, axis=1):
    return unzigzag(x, devices, axis) if layout == "zigzag" else x

  def whole(q, k, v, **given):
    given = {
      name: x if name in ("mask", "sinks") else there(x)
      for name, x in given.items()
    }
    specs = {
      name: P() if name in ("mask", "sinks") else TOKENS for name in given
    }
    call = jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(TOKENS, TOKENS, TOKENS, specs),
      out_specs=(TOKENS, ROWS),
    )
    o, lse = call(*map(there, (q, k, v)), given)
    return back(o), back(lse, 2)

  return whole


def pulled(call, args, do, dlse, **given):
  """((o, lse), gradients), the lse of empty rows having no cotangent."""

  @jax.jit
  def run(args, do, dlse, given):
    (o, lse), back = jax.vjp(lambda *args: call(*args, **given), *args)
    return (o, lse), back((do.astype(o.dtype), dlse.astype(lse.dtype)))

  return run(tuple(args), do, dlse, given)


def equal(got, want, share=1e-5):
  """Largest differences, as a share of the largest value."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.isfinite(b)
    np.testing.assert_array_equal(np.isneginf(a), ~finite)
    most = np.abs(b[finite]).max()
    assert np.abs(a[finite] - b[finite]).max() <= share * most


@pytest.mark.parametrize("case", cover(), ids=str)
def test_equals_one_device(case):
  """Float32 to 1e-5; bfloat16 as exactly as one device."""
  n, k = case.heads
  *args, do, dlse = inputs(B, T, T, n, k, 8, 4, jnp.dtype(case.dtype))
  given = {"segment_ids": np.asarray(segments(B, T))} if case.ids else {}
  call = divided(
    case.devices, case.layout, schedule=case.schedule, causal=case.causal
  )
  got = pulled(call, args, do, dlse, **given)
  mask = dense_mask(B, T, T, n, k, causal=case.causal, **given)
  want = by_hand(args, do, dlse, mask)
  if case.dtype == "float32":
    equal(got, want)
  else:
    naive = by_hand(args, do, dlse, mask, dtype=jnp.dtype(case.dtype))
    check(got, want, naive, 1e-5)


# --- settings ---


def own(b, devices, t, seed=0):
  """Positions within documents that begin anywhere; the last are EMPTY."""
  rng = np.random.default_rng(seed)
  x = np.stack([np.roll(np.arange(t), rng.integers(t)) for _ in range(b)])
  x[:, -3:] = EMPTY
  return x.astype(np.int32)


SETTINGS = {
  "window": {"window": (7, 4)},
  "causal window": {"window": (9, 0), "causal": True},
  "window ahead": {"window": (0, 13)},
  "softcap, scale": {"softcap": 0.9, "causal": True},
  "positions": {"positions": own(B, 4, T), "causal": True, "window": (20, 3)},
  "padding": {"positions": own(B, 4, T)[:1]},
  "ids of keys": {
    "segment_ids": np.asarray(segments(B, T)),
    "kv_segment_ids": np.asarray(segments(B, T, 5)),
  },
}


def each(names, some):
  """(name, schedule): `some` schedules of each name, in turn; others slow."""
  found = []
  for i, name in enumerate(names):
    for j, schedule in enumerate(SCHEDULES):
      slow = (j - some * i) % len(SCHEDULES) >= some
      marks = [pytest.mark.slow] if slow else []
      found.append(pytest.param(name, schedule, marks=marks))
  return found


@pytest.mark.parametrize("name, schedule", each(SETTINGS, 2))
def test_settings(name, schedule):
  """Each takes every schedule; layouts in turn."""
  settings, n, k = dict(SETTINGS[name]), 8, 4
  arrays = {
    key: jnp.asarray(settings.pop(key))
    for key in ("positions", "segment_ids", "kv_segment_ids")
    if key in settings
  }
  where = SCHEDULES.index(schedule) + list(SETTINGS).index(name)
  layout = ("zigzag", "contiguous")[where % 2]
  call = divided(4, layout, schedule=schedule, **settings)
  *args, do, dlse = inputs(B, T, T, n, k, 8)
  got = pulled(call, args, do, dlse, **arrays)
  seen = {key: np.asarray(x) for key, x in arrays.items()}
  if "positions" in seen:
    p = seen.pop("positions")[:, None]
    seen |= {"q_positions": p, "kv_positions": p}
  softcap = settings.pop("softcap", None)
  mask = dense_mask(B, T, T, n, k, **settings, **seen)
  equal(got, by_hand(args, do, dlse, mask, softcap=softcap))


@pytest.mark.parametrize("_, schedule", each([""], 1))
def test_sinks_are_added_once(_, schedule):
  """Also their gradient, which every device has a share of."""
  *args, do, dlse = inputs(B, T, T, 8, 4, 8)
  sinks = jnp.linspace(-1, 2, 8)
  call = divided(4, "zigzag", schedule=schedule, causal=True)
  got = pulled(
    lambda q, k, v, sinks: call(q, k, v, sinks=sinks),
    (*args, sinks),
    do,
    dlse,
  )
  mask = dense_mask(B, T, T, 8, 4, causal=True)
  equal(got, by_hand((*args, sinks), do, dlse, mask), 2e-5)


@pytest.mark.parametrize("layout, schedule", each(["zigzag", "contiguous"], 1))
def test_masks_of_the_whole_sequence(layout, schedule):
  """Traced, a block table for each row and head; causal besides."""
  blocks = np.random.default_rng(0).random((B, 8, 16, 24)) < 0.4
  blocks[:, :, 4:8] = False  # a device of the first layout that sees nothing
  *args, do, dlse = inputs(B, T, T, 8, 4, 8)
  if schedule == "ulysses":
    pytest.skip("refused, see below")
  call = divided(4, layout, schedule=schedule, causal=True)

  def run(*args, blocks):
    return call(*args, mask=BlockMask.from_blocks(blocks, block=(3, 2)))

  got = pulled(run, args, do, dlse, blocks=blocks)
  mask = dense_mask(B, T, T, 8, 4, causal=True)
  mask &= blocks.repeat(3, axis=2).repeat(2, axis=3)
  equal(got, by_hand(args, do, dlse, mask))


def test_a_mask_that_lost_blocks_is_nan():
  q, k, v, *_ = inputs(1, 16, 16, 2, 2, 4)
  blocks = np.ones((1, 1, 8, 8), bool)
  blocks[:, :, :, 2:] = np.arange(8)[:, None] == 5
  mask = BlockMask.from_blocks(jnp.asarray(blocks), block=(2, 2), capacity=2)
  o, lse = jax.jit(divided(4, schedule="kv_ring"))(q, k, v, mask=mask)
  lost = np.arange(16) // 2 == 5
  assert (np.isnan(o).any((0, 2, 3)) == lost).all()
  assert (np.isnan(lse).any((0, 1)) == lost).all()


@pytest.mark.parametrize("_, schedule", each([""], 3))
def test_other_lengths_and_nan_padding(_, schedule):
  """Keys of no one's segment, and queries without keys, may be anything."""
  t, s = 20, 28
  *args, do, dlse = inputs(B, t, s, 4, 4, 8, 12)
  ids, kv_ids = np.zeros((B, t), np.int32), np.zeros((B, s), np.int32)
  ids[:, -3:], kv_ids[:, -9:] = 1, 2
  q, k, v = (np.array(x) for x in args)
  q[:, -3:] = k[:, -9:] = v[:, -9:] = np.nan
  do = np.array(do)
  do[:, -3:] = np.nan
  call = divided(4, schedule=schedule)
  given = {"segment_ids": ids, "kv_segment_ids": kv_ids}
  got = pulled(call, (q, k, v), do, dlse, **given)
  mask = dense_mask(B, t, s, 4, 4, **given)
  q, k, v, do = (np.nan_to_num(x) for x in (q, k, v, do))
  equal(got, by_hand((q, k, v), do, dlse, mask))


def test_devices_that_see_nothing():
  """A window before the first token and past the last one."""
  *args, do, dlse = inputs(1, 16, 16, 2, 1, 4)
  positions = jnp.arange(16)[None].astype(jnp.int32) * 5
  call = divided(8, schedule="kv_ring", window=(2, 2))
  got = pulled(call, args, do, dlse, positions=positions)
  mask = np.broadcast_to(np.eye(16, dtype=bool), (1, 2, 16, 16))
  equal(got, by_hand(args, do, dlse, mask))


# --- meshes ---


def two():
  return Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "seq"))


@pytest.mark.parametrize(
  "rows, schedule", each(["manual", "checked", "left"], 2)
)
def test_rows_divided_too(rows, schedule):
  """By the same map, checked or not, or by whoever divides the rest."""
  *args, do, dlse = inputs(B, T, T, 8, 4, 8)
  run = functools.partial(
    ring_attention,
    schedule=schedule,
    layout="contiguous",
    causal=True,
    return_lse=True,
  )
  ids = segments(B, T)

  def local(q, k, v, ids):
    return run(q, k, v, segment_ids=ids)

  data = None if rows == "left" else "data"
  spec = P(data, "seq")
  call = jax.shard_map(
    local,
    mesh=two(),
    in_specs=(spec,) * 4,
    out_specs=(spec, P(data, None, "seq")),
    axis_names={"seq"} if rows == "left" else {"data", "seq"},
    check_vma=rows == "checked",
  )
  with jax.set_mesh(two()):
    got = pulled(lambda *args, ids: call(*args, ids), args, do, dlse, ids=ids)
  mask = dense_mask(B, T, T, 8, 4, causal=True, segment_ids=np.asarray(ids))
  equal(got, by_hand(args, do, dlse, mask))


@pytest.mark.parametrize("_, schedule", each([""], 2))
def test_repeats_agree_to_the_last_bit(_, schedule):
  *args, do, dlse = inputs(1, 16, 16, 4, 4, 8, dtype=jnp.bfloat16)
  call = divided(4, "zigzag", schedule=schedule, causal=True)

  @jax.jit
  def run(*args):
    (o, lse), back = jax.vjp(call, *args)
    return o, lse, back((do, dlse))

  first, again = run(*args), run(*args)
  assert all(map(np.array_equal, *map(jax.tree.leaves, (first, again))))


def test_remat_that_keeps_attention_sends_nothing_again():
  q, k, v, *_ = inputs(1, 16, 16, 2, 2, 4)
  mesh = Mesh(np.array(jax.devices()[:4]), ("seq",))

  def count(**kwargs):
    run = jax.checkpoint(
      functools.partial(ring_attention, schedule="kv_ring"), **kwargs
    )
    run = jax.shard_map(run, mesh=mesh, in_specs=TOKENS, out_specs=TOKENS)
    grad = jax.grad(lambda q: run(q, k, v).sum())
    return str(jax.make_jaxpr(grad)(q)).count("ppermute[")

  kept = count(policy=save_attention)
  assert kept == (2 * 3) + (2 * 3 + 2 * 3)  # forward, then with dk and dv
  assert count() == kept + 2 * 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_part_is_computed_again(schedule):
  """Two products forward, five backward, for each pair or for the whole."""
  q, k, v, *_ = inputs(1, 16, 16, 4, 4, 4)
  call = divided(4, schedule=schedule)
  count = 1 if schedule in ("all_gather", "ulysses") else 4

  def dots(run):
    return str(jax.make_jaxpr(run)(q, k, v)).count("dot_general[")

  assert dots(call) == 2 * count
  grad = jax.grad(lambda *x: call(*x)[0].sum(), argnums=(0, 1, 2))
  assert dots(grad) == (2 + 5) * count


def test_what_is_kept():
  """q, k, v, o and lse, each once."""
  q, k, v, *_ = inputs(1, 16, 16, 2, 2, 4)
  call = divided(2, schedule="token_ring")
  _, back = jax.vjp(jax.jit(lambda *x: call(*x)[0]), q, k, v)
  sizes = sorted(x.size for x in jax.tree.leaves(back) if x.dtype == q.dtype)
  assert sizes == sorted((2 * 16, *[16 * 2 * 4] * 4))


# --- refusals ---


def refuse(error, words, devices=4, arrays=None, **settings):
  q, k, v, *_ = inputs(1, 16, 16, 6, 2, 4)
  with pytest.raises(error, match=words) as caught:
    divided(devices, **settings)(q, k, v, **(arrays or {}))
  assert caught.type is error


@pytest.mark.parametrize(
  "words, settings",
  [
    ("schedule 'ring'; there are kv_ring", {"schedule": "ring"}),
    ("'stripes'; there are zigzag and", {"layout": "stripes", "causal": True}),
    ("its left width -1 is below 0", {"window": -1}),
    ("no axis 'model' here: call it in a jax.shard_map", {"axis": "model"}),
    ("softcap is -1.0", {"softcap": -1.0}),
  ],
)
def test_refused_settings(words, settings):
  refuse(ValueError, words, **settings)


def test_refused_sizes():
  ids = jnp.zeros((1, 16), jnp.int32)
  keys = {"kv_segment_ids": ids}
  refuse(ValueError, "given without segment_ids", arrays=keys)
  refuse(
    NotImplementedError,
    "each of 4 devices some heads, and there are 6 query heads and 2 kv",
    schedule="ulysses",
  )
  q, k, v, *_ = inputs(1, 16, 24, 6, 2, 4)
  with pytest.raises(ValueError, match="4 queries and 6 keys .* sees itself"):
    divided(4, causal=True)(q, k, v)
  with pytest.raises(ValueError, match="4 queries and 6 keys: segment_ids"):
    divided(4)(q, k, v, segment_ids=ids)
  q, k, v, *_ = inputs(1, 12, 12, 6, 2, 4)
  run = functools.partial(ring_attention, causal=True)
  mesh = Mesh(np.array(jax.devices()[:4]), ("seq",))
  run = jax.shard_map(run, mesh=mesh, in_specs=TOKENS, out_specs=TOKENS)
  with pytest.raises(ValueError, match="two chunks, and it has 3 queries"):
    run(q, k, v)


def test_refused_masks():
  whole = BlockMask.full(16, block=(2, 2))
  masks = {
    "a mask of 8 queries and 8 keys, and the sequence has 16": (
      ValueError,
      BlockMask.full(8, block=(2, 2)),
      {},
    ),
    "blocks of 8 tokens don't divide a device's 4": (
      ValueError,
      BlockMask.full(16, block=(8, 8)),
      {},
    ),
    "blocks that are seen in part": (
      NotImplementedError,
      BlockMask.causal(16, block=(2, 2)),
      {},
    ),
    "ulysses takes no mask": (
      NotImplementedError,
      whole,
      {"schedule": "ulysses", "devices": 2},
    ),
  }
  for words, (error, mask, settings) in masks.items():
    refuse(error, words, arrays={"mask": mask}, **settings)
  given = {"mask": whole, "positions": jnp.zeros((1, 16), jnp.int32)}
  refuse(NotImplementedError, "a mask with positions", arrays=given)


def test_one_device_is_a_ring_too():
  """And sends nothing."""
  q, k, v, *_ = inputs(1, 16, 16, 2, 2, 4)
  text = jax.jit(divided(1, "zigzag", causal=True)).lower(q, k, v)
  assert not re.search("permute|all-", text.compile().as_text())
