"""Keys as blocks of the sizes that the Mosaic GPU kernels take, and back."""

import functools

import jax
import jax.numpy as jnp

from isthmus.pallas.moba.api import Options
from isthmus.pallas.moba.layout import BlockLayout
from isthmus.pallas.moba.parts import taken
from isthmus.pallas.moba.places import split
from isthmus.pallas.moba.rows import chunks

#: Keys of a block that the kernels are compiled for. Larger ones are split.
KEYS = (64, 128)


def pieces(options: Options) -> tuple[int, int]:
  """(keys of a piece of a block, pieces).

  Example:
    >>> [pieces(Options(block, 1)) for block in (32, 100, 300)]
    [(64, 1), (128, 1), (128, 3)]
  """
  size = next((x for x in KEYS if x >= options.block), KEYS[-1])
  return size, -(-options.block // size)


class Blocks:
  """Keys as blocks of a size that kernels take, and back.

  Blocks that are no whole number of pieces take more memory than their keys,
  and are made of a few lanes at a time.

  Attributes:
    bounds: [l g], [l g] and [l 1]; where blocks start and stop, and one past
      the last key that anyone sees.

  Example:
    >>> from isthmus.pallas.moba.layout import uniform
    >>> x = jnp.ones((1, 150, 2, 8))
    >>> blocks = Blocks(Options(100, 1), x, x, uniform(150, 150, block=100))
    >>> lanes = blocks.keys(x)
    >>> cut = blocks.cut(lanes, blocks.bounds)
    >>> cut.shape, int(cut[0].sum()) == lanes[0].size
    ((2, 2, 128, 8), True)
    >>> lanes = blocks.joined(cut, blocks.keys_at())
    >>> bool((blocks.back(lanes) == x).all())
    True
  """

  def __init__(self, options, q, k, layout: BlockLayout):
    self.parts, self.s = chunks(q, k, q.size), k.shape[1]
    self.size, _ = pieces(options)
    self.aligned = layout.lost is None and options.block % self.size == 0
    # Any choice: blocks alone are wanted.
    none = jnp.zeros((0,), jnp.int32)
    _, start, stop = split(
      none, layout.start, layout.stop, block=options.block, size=self.size
    )
    last = jnp.max(layout.at, axis=1, keepdims=True)
    seen = jnp.minimum(last, self.s - 1) + 1
    self.bounds = tuple(self.parts.each(x) for x in (start, stop, seen))

  def keys(self, x):
    """[b s k d] -> what `cut` takes, of all lanes."""
    x = self.parts.lanes(x)
    if not self.aligned:
      return x
    # 0 NaN is NaN, so probabilities of 0 alone would let it through.
    start, _, seen = self.bounds
    there = jnp.arange(self.s) < seen
    x = jnp.where(there[..., None], x, 0)
    ends = start.shape[1] * self.size - self.s
    x = jnp.pad(x, ((0, 0), (0, ends), (0, 0)))
    return x.reshape(x.shape[0], -1, self.size, x.shape[2])

  def cut(self, x, bounds):
    """Of lanes, to [l g w d], 0 where there is no key that anyone sees."""
    if self.aligned:
      return x
    start, stop, seen = bounds
    index = start[..., None] + jnp.arange(self.size, dtype=jnp.int32)
    there = index < jnp.minimum(stop, seen)[..., None]
    index = jnp.where(there, index, self.s).reshape(x.shape[0], -1)
    return taken(x, index).reshape(x.shape[0], -1, self.size, x.shape[2])

  def keys_at(self):
    """int32 [l s], where each key is in the blocks of its lane, laid flat."""
    start, stop, _ = self.bounds
    key = jnp.arange(self.s, dtype=jnp.int32)
    if self.aligned:
      return jnp.broadcast_to(key, (start.shape[0], self.s))
    find = functools.partial(jnp.searchsorted, side="right")
    block = jax.vmap(find, in_axes=(0, None))(stop, key)
    first = jnp.take_along_axis(start, block, axis=1, mode="clip")
    g = start.shape[1]
    index = block * self.size + key - first
    return jnp.where(block < g, index, g * self.size)

  def joined(self, x, at):
    """[l g w d] -> [l s d] of lanes, 0 for a key of no block."""
    x = x.reshape(x.shape[0], -1, x.shape[3])
    return x[:, : self.s] if self.aligned else taken(x, at)

  def back(self, x):
    """[l s d] of all lanes -> [b s k d]."""
    x = x.reshape(self.parts.b, self.parts.heads, self.s, x.shape[2])
    return jnp.swapaxes(x, 1, 2)
