"""From parts that lie in places to rows: sums and softmax merges by gathers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Num

# Slots whose parts are added up in one go. Each further go reads and writes
# the sums so far, which are as wide as two parts.
_SOME = 32


def take(
  x: Num[Array, "l m *rest"], index: Int32[Array, "l e"]
) -> Num[Array, "l e *rest"]:
  """x of each lane at indices that are within it.

  Example:
    >>> take(jnp.array([[1.0, 2, 3]]), jnp.array([[2, 0]])).tolist()
    [[3.0, 1.0]]
  """
  index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def taken(
  x: Num[Array, "l m *rest"], index: Int32[Array, "l e"], fill: float = 0
) -> Num[Array, "l e *rest"]:
  """x of each lane at indices, and `fill` at those past its end.

  Example:
    >>> taken(jnp.array([[1.0, 2]]), jnp.array([[1, 2]])).tolist()
    [[2.0, 0.0]]
  """
  index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=fill)


def merged(
  o: Float[Array, "l p d"],
  lse: Float[Array, "l p"],
  place: Int32[Array, "l r c"],
  real: Bool[Array, "l r c"],
) -> tuple[Float[Array, "l r d"], Float[Array, "l r"]]:
  """(o, lse) of rows over parts, each of which has a softmax of its own.

  `lse = log sum_c exp(lse_c)`, `o = sum_c exp(lse_c - lse) o_c`, in the order
  of slots; summed in lse's dtype.

  Args:
    o, lse: of parts, in places.
    place: of each slot's part.
    real: whether there is such a part.

  Example:
    >>> o, lse = jnp.array([[[2.0], [4.0]]]), jnp.zeros((1, 2))
    >>> place, real = jnp.array([[[0, 1]]]), jnp.ones((1, 1, 2), bool)
    >>> merged(o, lse, place, real)[0].tolist()
    [[[3.0]]]
  """
  found = take(lse, place.reshape(place.shape[0], -1)).reshape(place.shape)
  found = jnp.where(real, found, -jnp.inf)
  top = jnp.max(found, axis=-1, keepdims=True)
  weight = jnp.exp(found - jnp.where(jnp.isneginf(top), 0.0, top))
  total = jnp.sum(weight, axis=-1)
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  out = summed(o, place, real, weight / total[..., None])
  return out, jnp.where(empty, -jnp.inf, top[..., 0] + jnp.log(total))


def summed(
  x: Float[Array, "l p d"],
  place: Int32[Array, "l r c"],
  real: Bool[Array, "l r c"],
  weight: Float[Array, "l r c"] | None = None,
) -> Float[Array, "l r d"]:
  """The sum over slots of what lies in each row's places, in their order.

  Args:
    x: in places; summed in at least float32.
    place, real: as in `merged`.
    weight: of each part, default 1.

  Example:
    >>> x, place = jnp.array([[[2.0], [4.0]]]), jnp.array([[[0, 1]]])
    >>> summed(x, place, place < 1).tolist()
    [[[2.0]]]
  """
  wide = jnp.promote_types(x.dtype, jnp.float32)
  slots = place.shape[2]

  def add(j, total):
    def at(y):
      return jax.lax.dynamic_index_in_dim(y, j, axis=2, keepdims=False)

    part = jnp.where(at(real)[..., None], take(x, at(place)), 0).astype(wide)
    return total + (part if weight is None else part * at(weight)[..., None])

  shape = (*place.shape[:2], x.shape[2])
  total = jax.lax.full_like(x, 0, wide, shape=shape)
  if slots > _SOME:
    return jax.lax.fori_loop(0, slots, add, total, unroll=_SOME)
  for j in range(slots):
    total = add(j, total)
  return total
