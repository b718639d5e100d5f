"""A cache whose keys can be found by block, with the running mean of each."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from isthmus.attention.cache import KVCache
from isthmus.attention.mask import EMPTY
from isthmus.pallas.precision import accumulator


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MobaCache:
  """A `KVCache`, and for blocks of positions the sum and count of their keys.

  Block j has the positions `j block, ..., (j + 1) block - 1`. Its centroid is
  what it stays as soon as it has all of its keys: queries of later blocks
  never meet another one. A row's tokens are at the positions 0, 1, ...; rows
  may differ in how many they have (ragged prompts, padding at EMPTY).

  Attributes:
    kv: keys, values and positions, slot by slot.
    sums: of each block's keys as they are stored, float32 [b g k d].
    counts: int32 [b g].
    slots: int32 [b s], the slot of the key at each position, -1 for none.
    block: positions of a block; static.

  Example:
    >>> cache = MobaCache.init(
    ...   batch=1, capacity=8, num_kv_heads=1, head_dim=1, block=2
    ... )
    >>> k = jnp.array([1.0, 3.0, 5.0]).reshape(1, 3, 1, 1)
    >>> cache = cache.append(k, k)
    >>> cache.centroids().ravel().tolist(), cache.counts.tolist()
    ([2.0, 5.0, 0.0, 0.0], [[2, 1, 0, 0]])
  """

  # Not annotated with shapes: jax fills the fields of a pytree with anything.
  kv: KVCache
  sums: Any
  counts: Any
  slots: Any
  block: int = dataclasses.field(metadata={"static": True})

  @classmethod
  def init(
    cls,
    *,
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    block: int,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
  ) -> "MobaCache":
    """An empty cache of one layer."""
    if block < 1:
      raise ValueError(f"block is {block}; it must be at least 1")
    g = -(-capacity // block)
    return cls(
      kv=KVCache.init(
        batch=batch,
        capacity=capacity,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
      ),
      sums=jnp.zeros((batch, g, num_kv_heads, head_dim), accumulator(dtype)),
      counts=jnp.zeros((batch, g), jnp.int32),
      slots=jnp.full((batch, capacity), -1, jnp.int32),
      block=block,
    )

  @property
  def k(self) -> Any:
    """The keys, by slot."""
    return self.kv.k

  @property
  def length(self) -> Any:
    """The slots written so far."""
    return self.kv.length

  @property
  def capacity(self) -> int:
    """Slots of a row, and positions that it may have."""
    return self.kv.capacity

  def append(
    self,
    k: Float[Array, "b t k d"],
    v: Float[Array, "b t k dv"],
    *,
    positions: Int32[Array, "#b t"] | None = None,
  ) -> "MobaCache":
    """The cache with t more keys and values, as `KVCache.append` adds them.

    Each position comes once. One that is not below the capacity has no place
    in a block; `moba_decode` makes what queries it NaN.
    """
    (b, t), s = k.shape[:2], self.capacity
    if positions is None:
      positions = (self.length + jnp.arange(t, dtype=jnp.int32))[None]
    positions = jnp.broadcast_to(positions, (b, t))
    kv = self.kv.append(k, v, positions=positions)
    # Past the capacity the last slot holds NaN, which then is what is found.
    slot = jnp.minimum(self.length + jnp.arange(t, dtype=jnp.int32), s - 1)
    rows = jnp.arange(b)[:, None]
    place = jnp.where((positions >= 0) & (positions < s), positions, s)
    slots = self.slots.at[rows, place].set(slot[None], mode="drop")
    new = dataclasses.replace(self, kv=kv, slots=slots)
    if t == 1:
      home = place // self.block
      inside = (place < s)[..., None, None]
      key = k.astype(kv.k.dtype).astype(self.sums.dtype)
      return dataclasses.replace(
        new,
        sums=self.sums.at[rows, home].add(
          jnp.where(inside, key, 0), mode="drop"
        ),
        counts=self.counts.at[rows, home].add(inside[..., 0, 0], mode="drop"),
      )
    # Many at once are summed in order, so that every run is the same.
    keys = new.ordered()[0].astype(self.sums.dtype)
    ends = ((0, 0), (0, -s % self.block))
    keys = jnp.pad(keys, (*ends, (0, 0), (0, 0)))
    keys = keys.reshape(b, -1, self.block, *keys.shape[2:])
    here = jnp.pad(slots >= 0, ends).reshape(b, -1, self.block)
    return dataclasses.replace(
      new,
      sums=jnp.sum(keys, axis=2),
      counts=jnp.sum(here, axis=2, dtype=jnp.int32),
    )

  def ordered(
    self,
  ) -> tuple[Float[Array, "b s k d"], Float[Array, "b s k dv"]]:
    """Copies of (keys, values) by position, 0 where there is none."""
    index = jnp.maximum(self.slots, 0)[..., None, None]
    real = (self.slots >= 0)[..., None, None]

    def pick(x):
      return jnp.where(real, jnp.take_along_axis(x, index, axis=1), 0)

    return pick(self.kv.k), pick(self.kv.v)

  def centroids(self) -> Float[Array, "b g k d"]:
    """The mean key of each block in the keys' dtype, 0 for an empty one."""
    count = jnp.maximum(self.counts, 1)[..., None, None]
    return (self.sums / count).astype(self.kv.k.dtype)


def is_lost(cache: MobaCache, positions: Int32[Array, "#b t"]) -> Any:
  """bool [#b t]: positions that the cache has no place for.

  Example:
    >>> cache = MobaCache.init(
    ...   batch=1, capacity=8, num_kv_heads=1, head_dim=1, block=2
    ... )
    >>> is_lost(cache, jnp.array([[7, 8, EMPTY]], jnp.int32)).tolist()
    [[False, True, False]]
  """
  return (positions >= cache.capacity) & (positions != EMPTY)
