"""The key blocks that `chunked` meets, query block by query block.

A `Hops` cuts queries and keys into blocks and runs a step on each pair that
has to meet. `Common` hops are those of all rows and heads at once; `Listed`
ones follow lists that differ between them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.dispatch import platform
from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.lists import compact
from isthmus.pallas.flash.plan import classify
from isthmus.pallas.flash.ref import group


class Here(NamedTuple):
  """A query block: its index, its operands, and its key blocks.

  Attributes:
    index: which one it is.
    q: operands by query, each [b|1 k|1 g|1 c 1].
    full_num, full: how many key blocks are seen whole, and which.
    partial_num, partial: those that are tested element by element.

  Example:
    >>> Here(0, (), 2, jnp.array([0, 1]), 0, None).full_num
    2
  """

  index: Any
  q: tuple[Any, ...]
  full_num: Any
  full: Any
  partial_num: Any
  partial: Any


class Hop(NamedTuple):
  """The keys a query block meets in a step.

  Attributes:
    k, v: [b k l w d].
    j: their indices, to broadcast to [b k g c w].
    mask: what is seen of them, [b|1 k|1 g|1 c|1 w]; None if all is.
    add: adds something by key, [b k l w d], to an accumulator of `zeros`.

  Example:
    >>> Hop(None, None, 0, None, lambda total, x: total + x).add(1, 2)
    3
  """

  k: Any
  v: Any
  j: Any
  mask: Any
  add: Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Hops:
  """What both kinds of walk share: blocks of queries.

  Attributes:
    options, extras: of the call.
    t, s: numbers of queries and keys.
    heads: kv heads.
    block: (c, w), queries and keys of a block.
    k, v: as the kind of walk reads them.
    blocks: a `Here` of all query blocks, along a leading axis.

  Example:
    >>> x = jnp.ones((1, 6, 2, 8))
    >>> walk = hops(Options(), Extras(), x, x, x, (4, 4))
    >>> walk.queries(x).shape  # two blocks [b k g c d]
    (2, 1, 2, 1, 4, 8)
    >>> walk.time_first(walk.queries(x)).shape
    (1, 6, 2, 8)
  """

  options: Options
  extras: Extras
  t: int
  s: int
  heads: int
  block: tuple[int, int]
  k: Any
  v: Any
  blocks: Here

  def queries(self, x: Float[Array, "b t n d"]) -> Float[Array, "q b k g c d"]:
    """x in blocks, heads first."""
    b, _, n, d = x.shape
    x = _pad(x, self.block[0], 1)
    x = x.reshape(b, -1, self.block[0], self.heads, n // self.heads, d)
    return x.transpose(1, 0, 3, 4, 2, 5)

  def split(self, x: Float[Array, "b n t"]) -> Float[Array, "q b k g c"]:
    """The same of what has no width."""
    b, n, _ = x.shape
    x = _pad(x, self.block[0], 2)
    x = x.reshape(b, self.heads, n // self.heads, -1, self.block[0])
    return jnp.moveaxis(x, 3, 0)

  def time_first(
    self, x: Float[Array, "q b k g c d"]
  ) -> Float[Array, "b t n d"]:
    """`queries`, turned back."""
    _, b, _, _, _, d = x.shape
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(b, -1, self.heads * x.shape[4], d)[:, : self.t]

  def rows(self, x: Float[Array, "q b k g c"]) -> Float[Array, "b n t"]:
    """`split`, turned back."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(x.shape[0], self.heads * x.shape[2], -1)[..., : self.t]

  def loop(self, step: Callable[..., Any], carry: Any, here: Here) -> Any:
    """`carry = step(carry, hop)` for each hop of a query block."""
    for name, masked in (("full", False), ("partial", True)):
      if getattr(here, name) is None:
        continue

      def body(a, carry, name=name, masked=masked):
        num, index = getattr(here, name + "_num"), getattr(here, name)
        return step(carry, self.hop(here, a, num, index, masked))

      count = self.count(getattr(here, name + "_num"), getattr(here, name))
      carry = jax.lax.fori_loop(0, count, body, carry)
    return carry

  def count(self, num: Any, index: Any) -> Any:
    """The steps along a list."""
    raise NotImplementedError

  def hop(self, here: Here, a: Any, num: Any, index: Any, masked: bool) -> Hop:
    """Step `a` along a list of key blocks."""
    raise NotImplementedError

  def zeros(self, x: Float[Array, "b s k d"], dtype: Any) -> Any:
    """An accumulator by key that `Hop.add` takes."""
    raise NotImplementedError

  def keys_back(
    self, total: Any, like: Float[Array, "b s k d"]
  ) -> Float[Array, "b s k d"]:
    """What an accumulator sums to, as an array by key."""
    raise NotImplementedError

  def mask(self, here: Here, j: Any, k: tuple[Any, ...], *, tail: bool) -> Any:
    """What the predicate shows; `tail`: and whether the indices are real."""
    i = here.index * self.block[0] + jnp.arange(self.block[0])[:, None]
    mask = jnp.ones((1, 1), bool)
    if tail and self.options.predicate is not None:
      mask = self.options.predicate(i, j, here.q, k)
    if tail and self.t % self.block[0]:
      # Rows past the end must not make keys look seen that no query sees.
      mask = mask & (i < self.t)
    if self.s % self.block[1]:
      mask = mask & (j < self.s)
    return mask.reshape((1,) * (5 - mask.ndim) + mask.shape)


class Common(Hops):
  """Hops along chunks that are those of all rows and heads.

  Example:
    >>> x = jnp.ones((1, 6, 2, 8))
    >>> isinstance(hops(Options(), Extras(), x, x, x, (4, 4)), Common)
    True
  """

  def count(self, num, index):
    """Each chunk of the list by itself."""
    # A static number, where it is one: loops on a GPU needn't look it up.
    return index.shape[-1] if self.options.predicate is None else num

  def hop(self, here, a, num, index, masked):
    """The chunk at place a."""
    w = self.block[1]
    start = index[a] * w

    def take(x):
      return jax.lax.dynamic_slice_in_dim(x, start, w, axis=2)

    def add(total, x):
      x = take(total) + x[:, :, 0]
      return jax.lax.dynamic_update_slice_in_dim(total, x, start, axis=2)

    j = start + jnp.arange(w)
    mask = None
    if masked:
      ops = tuple(
        take(_pad(x, w, 2))[:, :, None, None, :] for x in self.extras.k
      )
      mask = _fixed(self.mask(here, j, ops, tail=True))
    return Hop(take(self.k)[:, :, None], take(self.v)[:, :, None], j, mask, add)

  def zeros(self, x, dtype):
    """[b k s d], s a multiple of the chunk."""
    return jax.lax.full_like(
      self.k, 0, dtype, shape=(*self.k.shape[:3], x.shape[3])
    )

  def keys_back(self, total, like):
    """[b k s d] as [b s k d]."""
    return jnp.swapaxes(total[:, :, : self.s], 1, 2).astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class Listed(Hops):
  """Hops along the lists of each row and head, `times` entries a step.

  Example:
    >>> from isthmus.pallas.flash.lists import listed
    >>> x = jnp.ones((1, 6, 2, 8))
    >>> lists = listed(jnp.ones((1, 2, 3, 3), bool), block=(2, 2))
    >>> walk = hops(Options(), Extras(lists=lists), x, x, x, (4, 4))
    >>> walk.block, walk.times, int(walk.count(jnp.array([3]), jnp.arange(3)))
    ((2, 2), 2, 2)
  """

  lanes: int = 1
  times: int = 1

  def count(self, num, index):
    """As many steps as the longest list needs."""
    longest = jnp.minimum(jnp.max(num), index.shape[-1])
    return (longest + self.times - 1) // self.times

  def hop(self, here, a, num, index, masked):
    """The entries from a * times on."""
    (b, heads), w = self.k.shape[:2], self.block[1]
    at = a * self.times + jnp.arange(self.times)
    real = at < num[..., None]
    index = jnp.take(index, at, axis=-1, mode="clip")
    index = jnp.broadcast_to(index, (b, heads, self.lanes, self.times))
    flat = index.reshape(b, heads, -1)

    def take(x):
      """x [b k kb w ...] at the entries: [b k l times * w ...]."""
      pick = jax.vmap(jax.vmap(lambda x, i: x.at[i].get(mode="clip")))
      x = pick(x, flat)
      return x.reshape(b, heads, self.lanes, -1, *x.shape[4:])

    def add(total, x):
      x = x.reshape(*index.shape, w, -1)
      rows = jnp.ix_(*(jnp.arange(size) for size in index.shape[:3]))
      rows = tuple(r[..., None] for r in rows)
      # Entries past a list's end say an index again, and add 0 to it.
      return total.at[(*rows, index)].add(x, mode="clip")

    j = index[..., None] * w + jnp.arange(w)
    j = j.reshape(b, heads, self.lanes, 1, -1)
    ops = ()
    if masked:
      ops = tuple(
        take(self.by_block(x))[:, :, :, None, :] for x in self.extras.k
      )
    mask = self.mask(here, j, ops, tail=masked)
    mask = mask & jnp.repeat(real, w, axis=-1)[..., None, :]
    return Hop(take(self.k), take(self.v), j, _fixed(mask), add)

  def by_block(self, x):
    """An operand by key [b|1 k|1 s] as [b k kb w]."""
    x = _pad(x, self.block[1], 2)
    x = x.reshape(*x.shape[:2], -1, self.block[1])
    return jnp.broadcast_to(x, (*self.k.shape[:2], *x.shape[2:]))

  def zeros(self, x, dtype):
    """[b k l kb w d]: heads add to their own, so that the order is one."""
    b, heads, kb, w, _ = self.k.shape
    shape = (b, heads, self.lanes, kb, w, x.shape[3])
    return jax.lax.full_like(self.k, 0, dtype, shape=shape)

  def keys_back(self, total, like):
    """[b k l kb w d] as [b s k d]."""
    b, heads, _, _, _, d = total.shape
    total = jnp.sum(total, axis=2).reshape(b, heads, -1, d)
    return jnp.swapaxes(total[:, :, : self.s], 1, 2).astype(like.dtype)


def hops(
  options: Options,
  extras: Extras,
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  chunk: tuple[int, int],
) -> Hops:
  """The walk of a call.

  Args:
    options, extras: of the call.
    q, k, v: its arrays.
    chunk: queries and keys of a chunk, where there are no lists; with lists
      as many entries make a step as have about that many keys.

  Example:
    >>> x = jnp.ones((1, 6, 2, 8))
    >>> walk = hops(Options(), Extras(), x, x, x, (4, 4))
    >>> walk.blocks.index.tolist(), walk.blocks.full.tolist()
    ([0, 1], [[0], [0]])
  """
  (_, t, n, _), (_, s, heads, _) = q.shape, k.shape
  block = chunk if extras.lists is None else extras.lists.block
  if extras.lists is None:
    block = (min(chunk[0], t), min(chunk[1], s))
  blocks = -(-t // block[0])
  operands = tuple(
    jnp.moveaxis(
      _pad(x, block[0], 3).reshape(*x.shape[:3], blocks, block[0], 1), 3, 0
    )
    for x in (group(x, heads) for x in extras.q)
  )
  k, v = (jnp.swapaxes(_pad(x, block[1], 1), 1, 2) for x in (k, v))
  shared = (options, extras, t, s, heads, block)
  index = jnp.arange(blocks, dtype=jnp.int32)
  if extras.lists is None:
    here = _chunks(options, extras, t, s, n, block)
    return Common(*shared, k, v, Here(index, operands, *here))
  k, v = (x.reshape(*x.shape[:2], -1, block[1], x.shape[3]) for x in (k, v))
  lists = extras.lists
  fields = (lists.full_num, lists.full, lists.partial_num, lists.partial)
  here = [
    None if x is None else jnp.moveaxis(group(x, heads), 3, 0) for x in fields
  ]
  if lists.full.shape[-1] == 0:
    here[:2] = None, None
  if lists.partial is not None and lists.partial.shape[-1] == 0:
    here[2:] = None, None
  lanes = 1 if lists.full.shape[1] == 1 else n // heads
  times = max(1, chunk[1] // block[1])
  return Listed(*shared, k, v, Here(index, operands, *here), lanes, times)


def _chunks(options, extras, t, s, n, block):
  """The fields of `Here` for chunks that all rows and heads share."""
  some, every = classify(
    options.predicate,
    extras.q,
    extras.k,
    t=t,
    s=s,
    block=block,
    num_heads=n,
  )
  some, every = some.any((0, 1)), every.all((0, 1))
  qb, kb = some.shape
  cut = s % block[1] != 0
  if options.predicate is None:
    order = jnp.broadcast_to(jnp.arange(kb, dtype=jnp.int32), (qb, kb))
    num = jnp.full(qb, kb - cut, jnp.int32)
    rest = (jnp.full(qb, 1, jnp.int32), order[:, -1:]) if cut else (None, None)
    return num, order[:, : kb - cut], *rest
  if cut:
    every = every & (jnp.arange(kb) < kb - 1)
  full_num, full = compact(some & every)
  return full_num, full, *compact(some & ~every)


def _pad(x, block, axis):
  """x with zeros, to a multiple of the block."""
  short = -x.shape[axis] % block
  if not short:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, short)
  return jnp.pad(x, widths)


def _fixed(mask):
  """The mask, computed by itself on a CPU.

  Fused into the exponential, the comparisons keep it from being vectorised.
  """
  return jax.lax.optimization_barrier(mask) if platform() == "cpu" else mask
