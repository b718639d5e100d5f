"""Plans of tiles against element masks decided one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.flash.lists import Lists, dropped, listed, overflowed
from isthmus.pallas.flash.plan import classify, most, ranges, restrict, tiles
from isthmus.pallas.flash.predicate import (
  EMPTY,
  Band,
  BlockDiagonal,
  Both,
  Either,
  Positions,
  Prefix,
  Range,
  Segments,
)

pytestmark = pytest.mark.once

T, S, N = 22, 27, 4
RNG = np.random.default_rng(0)
PLACES = jnp.asarray(RNG.permutation(2 * S).reshape(1, 2, S), jnp.int32)
# (predicate, operands by query, by key); keys of 2 heads, of one, or none.
RULES = {
  "none": (None, (), ()),
  "causal": (Band(None, 0, S - T), (), ()),
  "window": (Band(5, 2, S - T), (), ()),
  "segments": (
    Segments(),
    (jnp.asarray(np.sort(RNG.integers(0, 5, (2, 1, T))), jnp.int32),),
    (jnp.asarray(np.sort(RNG.integers(0, 5, (2, 1, S))), jnp.int32),),
  ),
  "positions of each kv head": (
    Positions(9, 0),
    (jnp.arange(T, dtype=jnp.int32)[None, None] * 2,),
    (jnp.where(PLACES < 8, EMPTY, PLACES),),
  ),
}


def _elements(rule, t=T, s=S, n=N):
  """bool [b, n, t, s]; heads share kv heads in turn."""
  predicate, q, k = rule
  if predicate is None:
    return np.ones((1, n, t, s), bool)
  b = max([x.shape[0] for x in (*q, *k)], default=1)
  mask = np.zeros((b, n, t, s), bool)
  for row, head in np.ndindex(b, n):
    ours = [np.asarray(x[row % len(x), head % x.shape[1]]) for x in q]
    theirs = [np.asarray(x[row % len(x), head * x.shape[1] // n]) for x in k]
    mask[row, head] = predicate(
      np.arange(t)[:, None],
      np.arange(s),
      tuple(x[:, None] for x in ours),
      tuple(theirs),
    )
  return mask


def _blocks(lists, s=S):
  """(full, partial) block by block, written out."""
  kb = -(-s // lists.block[1])
  found = []
  for num, index in (
    (lists.full_num, lists.full),
    (lists.partial_num, lists.partial),
  ):
    blocks = np.zeros((*lists.full_num.shape, kb), bool)
    if num is not None:
      num, index = np.asarray(num), np.asarray(index)
      for row in np.ndindex(num.shape):
        entries = index[row][: num[row]].tolist()
        assert entries == sorted(set(entries))
        blocks[row][entries] = True
    found.append(blocks)
  return found


def _spread(blocks, block, t=T, s=S):
  """Blocks as elements."""
  blocks = np.repeat(np.asarray(blocks), block[0], axis=2)
  return np.repeat(blocks, block[1], axis=3)[..., :t, :s]


def _meaning(lists, elements, t=T, s=S):
  """What lists show, given the elements that their predicate does."""
  full, partial = _blocks(lists, s)
  assert lists.full_num.shape[-1] == -(-t // lists.block[0])
  assert not (full & partial).any()
  seen = _spread(full, lists.block, t, s)
  seen = seen | (_spread(partial, lists.block, t, s) & elements)
  return np.broadcast_to(seen, np.broadcast_shapes(seen.shape, elements.shape))


def _seen_in(lists, elements):
  """How many elements each listed block shows."""
  listed_blocks = np.logical_or(*_blocks(lists))
  bq, bk = lists.block
  return np.array(
    [
      elements[:, :, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk].sum()
      for _, _, i, j in zip(*np.nonzero(listed_blocks), strict=True)
    ]
  )


def _check_full(lists, elements):
  """The predicate holds in every full block."""
  full, _ = _blocks(lists)
  full = _spread(full, lists.block)
  assert (elements | ~full).all()


def _lists(block, seed=0, capacity=None, heads=N):
  rng = np.random.default_rng(seed)
  shape = (1, heads, -(-T // block[0]), -(-S // block[1]))
  kind = jnp.asarray(rng.integers(0, 3, shape))
  return listed(kind == 2, kind == 1, block=block, capacity=capacity)


def test_ranges_of_whole_and_short_tiles():
  x = np.random.default_rng(0).integers(-9, 9, (2, 3, 11)).astype(np.int32)
  for block in (1, 4, 11, 16):
    found = ranges(jnp.asarray(x), block)
    for tile in range(-(-11 // block)):
      part = x[..., tile * block : (tile + 1) * block]
      np.testing.assert_array_equal(found.low[..., tile], part.min(-1))
      np.testing.assert_array_equal(found.high[..., tile], part.max(-1))


@pytest.mark.parametrize("name", RULES)
def test_tiles_of_a_predicate(name):
  """Elements are all there, and no tile is listed or tested in vain."""
  rule = RULES[name]
  elements = _elements(rule)
  for block, mask_end in (((8, 4), False), ((4, 8), True), ((1, 32), True)):
    lists = tiles(
      None, *rule, t=T, s=S, block=block, num_heads=N, mask_end=mask_end
    )
    np.testing.assert_array_equal(_meaning(lists, elements), elements)
    _check_full(lists, elements)
    full, partial = _blocks(lists)
    if mask_end:
      assert not full[..., -1].any()
    if name in ("causal", "window") and not mask_end:
      some = [
        elements[..., i : i + block[0], j : j + block[1]].any((-1, -2))
        for i in range(0, T, block[0])
        for j in range(0, S, block[1])
      ]
      wanted = np.stack(some, -1).reshape(*elements.shape[:2], *full.shape[2:])
      np.testing.assert_array_equal(
        np.broadcast_to(full | partial, wanted.shape), wanted
      )


@pytest.mark.parametrize("name", RULES)
def test_blocks_are_cut_into_tiles(name):
  rule = RULES[name]
  elements = _elements(rule)
  given = _lists((8, 4))
  if rule[0] is None:
    given = Lists(given.full_num, given.full, None, None, given.block)
  else:  # blocks seen whole satisfy the predicate
    given = restrict(given, *rule, t=T, s=S, num_heads=N)
  wanted = _meaning(given, elements)
  assert wanted.any() and not wanted.all()
  for block, mask_end in (((4, 4), False), ((2, 1), True), ((8, 4), True)):
    lists = tiles(
      given, *rule, t=T, s=S, block=block, num_heads=N, mask_end=mask_end
    )
    assert lists.block == block
    np.testing.assert_array_equal(_meaning(lists, elements), wanted)
    _check_full(lists, elements)
    assert not overflowed(lists).any()
    if mask_end and S % block[1]:
      assert not _blocks(lists)[0][..., -1].any()


def test_tiles_of_partial_blocks_are_asked_again():
  """Only those on the diagonal are still tested."""
  band = Band(None, 0)
  given = tiles(None, band, t=32, s=32, block=(16, 16))
  lists = tiles(given, band, t=32, s=32, block=(4, 4))
  assert lists.partial_num.tolist() == [[[1] * 8]]
  assert lists.full_num.tolist() == [[[*range(8)]]]


def test_lists_of_tiles_are_returned_as_they_are():
  lists = _lists((8, 9))  # 27 keys: no tile is cut short
  band = RULES["causal"]
  assert tiles(lists, None, t=T, s=S, block=(8, 9)) is lists
  assert tiles(lists, *band, t=T, s=S, block=(8, 9)) is lists
  short = _lists((8, 4))
  assert tiles(short, None, t=T, s=S, block=(8, 4)) is not short
  assert tiles(short, None, t=T, s=S, block=(8, 4), mask_end=False) is short


@pytest.mark.parametrize("name", RULES)
def test_restrict_equals_the_intersection(name):
  rule = RULES[name]
  elements = _elements(rule)
  for given in (_lists((8, 4)), _lists((4, 8), heads=1)):
    own = np.random.default_rng(3).random((1, N, T, S)) < 0.5
    lists = restrict(given, *rule, t=T, s=S, num_heads=N)
    ours = _meaning(lists, elements & own)
    # In what was full, the lists' own predicate holds.
    full = _spread(_blocks(given)[0], given.block)
    own = own | full
    wanted = _meaning(given, own) & elements
    np.testing.assert_array_equal(
      np.broadcast_to(_meaning(lists, elements & own), wanted.shape), wanted
    )
    assert ours.any()
    assert lists.block == given.block and not overflowed(lists).any()
    # What stays full satisfies the condition.
    kept = _spread(_blocks(lists)[0], lists.block)
    assert (elements | ~kept).all() and (full | ~kept).all()
    if name in ("causal", "window"):  # and what is listed is seen somewhere
      assert (_seen_in(lists, elements) > 0).all()
  assert restrict(given, None, t=T, s=S) is given


def test_rows_that_overflowed_stay_marked():
  given = _lists((8, 8), capacity=1)
  lost = np.asarray(dropped(given))
  assert (lost > 0).any() and (lost == 0).any()
  band = RULES["causal"]
  np.testing.assert_array_equal(dropped(restrict(given, *band, t=T, s=S)), lost)
  for block in ((4, 4), (8, 2), (8, 8)):
    cut = tiles(given, *band, t=T, s=S, block=block)
    rows = np.repeat(lost > 0, 8 // block[0], axis=2)[..., : -(-T // block[0])]
    np.testing.assert_array_equal(overflowed(cut), rows)


def test_capacity_of_a_predicate():
  lists = tiles(None, Band(None, 0), t=32, s=32, block=(4, 4), capacity=3)
  assert dropped(lists).tolist() == [[[0, 0, 0, 0, 1, 2, 3, 4]]]


def _bounds(predicate, t, s, block):
  """`classify` without operands, in numpy."""
  if predicate is None:
    return np.ones((2, 1, -(-s // block[1])), bool)
  first = np.arange(0, t, block[0])[:, None]
  i = Range(first, np.minimum(first + block[0], t) - 1)
  first = np.arange(0, s, block[1])
  j = Range(first, np.minimum(first + block[1], s) - 1)
  return predicate.tiles(i, j, (), ())


@pytest.mark.parametrize("seed", range(12))
def test_most_is_never_exceeded(seed):
  rng = np.random.default_rng(seed)
  size, left, right, offset = (int(x) for x in rng.integers(1, 40, 4))
  kinds = [
    Band(None, right - 20, offset - 20),
    Band(left, None, offset - 20),
    Band(left, right - 20, offset),
    BlockDiagonal(size, offset),
    Prefix(size),
    None,
  ]
  kinds += [
    Both(kinds[0], kinds[3]),
    Either(kinds[2], kinds[4]),
    Either(kinds[2], kinds[3]),
  ]
  t, s = (int(x) for x in rng.integers(20, 60, 2))
  for predicate, block in itertools.product(kinds, ((8, 4), (4, 8), (1, 3))):
    some, every = _bounds(predicate, t, s, block)
    full, partial = most(predicate, block, -(-s // block[1]))
    assert every.sum(-1).max() <= full
    assert (some & ~every).sum(-1).max() <= partial


def test_under_jit_and_vmap():
  """Traced lists and operands; each row as by itself."""
  predicate, q, k = RULES["segments"]

  def plan(lists, q, k):
    lists = restrict(lists, predicate, (q,), (k,), t=T, s=S)
    return tiles(lists, predicate, (q,), (k,), t=T, s=S, block=(4, 4))

  lists = _lists((8, 8))
  ours = jax.jit(jax.vmap(plan, in_axes=(None, 0, 0)))(
    lists, q[0][:, None], k[0][:, None]
  )
  for row in range(2):
    alone = plan(lists, q[0][row : row + 1], k[0][row : row + 1])
    mine = jax.tree.map(lambda x, row=row: x[row], ours)
    jax.tree.map(np.testing.assert_array_equal, mine, alone)


def test_refusals_name_both_numbers():
  lists = _lists((8, 8))
  with pytest.raises(ValueError, match=r"\(8, 8\) are not mult.*\(128, 128\)"):
    tiles(lists, None, t=T, s=S)
  with pytest.raises(ValueError, match="3 query blocks of 8; 90 .* make 12"):
    tiles(lists, None, t=90, s=S, block=(8, 8))
  with pytest.raises(ValueError, match="3 query blocks of 8; 90 .* make 12"):
    restrict(lists, Band(None, 0), t=90, s=S)
  rule = RULES["positions of each kv head"]
  for heads in (None, 3):
    with pytest.raises(ValueError, match=f"2 key heads: num_heads is {heads}"):
      classify(*rule, t=T, s=S, block=(8, 8), num_heads=heads)


def test_nothing_grows_with_elements():
  """Every array on the way is far below t x s."""
  t, block = 16384, (128, 128)
  ids = jax.ShapeDtypeStruct((1, 1, t), jnp.int32)
  rule = Both(Band(None, 0), Segments())

  def plan(q, k):
    lists = tiles(None, rule, (q,), (k,), t=t, s=t, block=block)
    return restrict(lists, Segments(), (q,), (k,), t=t, s=t)

  compiled = jax.jit(plan).lower(ids, ids).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < t * t // 100
