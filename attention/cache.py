"""Keys and values of the past, for decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from isthmus.attention.mask import EMPTY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """A buffer of fixed capacity that `append` fills from the left.

  Attention reads `k` and `v` whole, and learns from `positions` which slots
  count: an empty slot is at `EMPTY`, which no query sees. Rows may hold
  different positions in one slot (ragged prompts). A leading axis of layers
  may be put before all fields.

  Attributes:
    k: keys [b s k d].
    v: values [b s k dv].
    positions: int32 [b s], EMPTY where nothing is stored.
    length: int32 [], the slots written so far.

  Example:
    >>> cache = KVCache.init(batch=2, capacity=8, num_kv_heads=1, head_dim=4)
    >>> cache = cache.append(jnp.ones((2, 3, 1, 4)), jnp.ones((2, 3, 1, 4)))
    >>> int(cache.length)
    3
  """

  # Not annotated with shapes: jax fills the fields of a pytree with anything.
  k: Any
  v: Any
  positions: Any
  length: Any

  @classmethod
  def init(
    cls,
    *,
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    depth: int | None = None,
    dtype: Any = jnp.float32,
  ) -> "KVCache":
    """An empty cache; with `depth`, one for each layer along a leading axis."""
    lead = () if depth is None else (depth,)
    shape = (*lead, batch, capacity, num_kv_heads)
    return cls(
      k=jnp.zeros((*shape, head_dim), dtype),
      v=jnp.zeros((*shape, value_dim or head_dim), dtype),
      positions=jnp.full((*lead, batch, capacity), EMPTY, jnp.int32),
      length=jnp.zeros(lead, jnp.int32),
    )

  @property
  def capacity(self) -> int:
    """Slots of a row."""
    return self.k.shape[-3]

  def append(
    self,
    k: Float[Array, "b t k d"],
    v: Float[Array, "b t k dv"],
    *,
    positions: Int32[Array, "#b t"] | None = None,
  ) -> "KVCache":
    """The cache with t more keys and values in its next slots.

    Args:
      k: new keys.
      v: new values.
      positions: theirs, by default length, length + 1, ...; EMPTY marks
        padding: it takes a slot, holds 0 there and is never seen.

    Returns:
      The new cache. Past the capacity, what `length` can only say at run
      time, the written slots are NaN, so that the overflow can't pass unseen.

    Raises:
      ValueError: t is above the capacity, or shapes don't fit.
    """
    b, s, heads, _ = self.k.shape
    t = k.shape[1]
    if t > s:
      raise ValueError(f"{t} keys do not fit a cache of capacity {s}")
    if k.shape[::2] != (b, heads):
      raise ValueError(
        f"keys {k.shape} do not fit a cache of batch {b} and {heads} heads"
      )
    if positions is None:
      positions = (self.length + jnp.arange(t, dtype=jnp.int32))[None]
    fits = self.length + t <= s
    padding = (positions == EMPTY)[..., None, None]

    def put(buffer, new):
      new = jnp.where(padding, 0, new.astype(buffer.dtype))
      new = jnp.where(fits, new, jnp.nan)
      start = (0, self.length, 0, 0)
      return jax.lax.dynamic_update_slice(buffer, new, start)

    return KVCache(
      k=put(self.k, k),
      v=put(self.v, v),
      positions=jax.lax.dynamic_update_slice(
        self.positions, jnp.broadcast_to(positions, (b, t)), (0, self.length)
      ),
      length=self.length + t,
    )
