"""How arrays move between the devices of an axis, inside `jax.shard_map`."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from isthmus.attention.pair import Setting
from isthmus.attention.schedule import Hops
from isthmus.attention.zigzag import unzigzag, zigzag


def turn(axis: str, tree: Any, by: int) -> Any:
  """Every array of device r, on device r + by.

  Example:
    >>> from jax.sharding import Mesh, PartitionSpec
    >>> spec = PartitionSpec("seq")
    >>> mesh = Mesh(jax.devices(), "seq")
    >>> run = lambda x: turn("seq", x, 1)
    >>> run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    >>> x = np.arange(3 * mesh.size)
    >>> bool((jax.jit(run)(x) == np.roll(x, 3)).all())
    True
  """
  size = jax.lax.axis_size(axis)
  if size == 1:
    return tree
  pairs = [(r, (r + by) % size) for r in range(size)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tree)


def tour(
  axis: str, tree: Any, plan: Hops, *, reverse: bool = False
) -> Iterator[tuple[int, int, Any]]:
  """Arrays as they come by, one hop after another.

  Args:
    axis: the mesh axis.
    tree: arrays of this device.
    plan: how many hops ahead, and how many behind at the same time.
    reverse: go the other way round.

  Yields:
    (way, shift, arrays): those of device r - shift, or r + shift if reversed;
    way is 1 where they came ahead, -1 behind, and 0 where half and half.

  Example:
    >>> list(tour("seq", {}, Hops((), 0, 0)))
    []
  """
  sign = -1 if reverse else 1
  ahead = behind = tree
  for step in range(1, max(plan.ahead, plan.behind) + 1):
    if step <= plan.ahead:
      ahead = turn(axis, ahead, sign)
      yield 1, step, ahead
    if step <= plan.behind:
      behind = turn(axis, behind, -sign)
      yield -1, -step, behind
  if plan.across:
    first = jax.tree.map(lambda x: x[:, : x.shape[1] // 2], ahead)
    rest = jax.tree.map(lambda x: x[:, x.shape[1] // 2 :], behind)
    first, rest = turn(axis, first, sign), turn(axis, rest, -sign)
    yield 0, plan.ahead + 1, jax.tree.map(_join, first, rest)


def _join(first, rest):
  return jnp.concatenate([first, rest], axis=1)


def gather(setting: Setting, x: Shaped[Array, "b t ..."]) -> Any:
  """All devices' tokens in the order of the sequence.

  What is shared by all rows keeps its batch of 1.

  Example:
    >>> from jax.sharding import Mesh, PartitionSpec as P
    >>> mesh = Mesh(jax.devices()[:1], "seq")
    >>> setting = Setting("seq", 1, "all_gather", "zigzag")
    >>> run = jax.shard_map(
    ...   lambda x: gather(setting, x),
    ...   mesh=mesh,
    ...   in_specs=P(None, "seq"),
    ...   out_specs=P("seq"),
    ... )
    >>> jax.jit(run)(np.arange(8)[None]).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
  """
  x = jax.lax.all_gather(x, setting.axis, axis=1, tiled=True)
  return _sorted(setting, x)


def scatter(setting: Setting, x: Shaped[Array, "b t ..."]) -> Any:
  """Sums over devices, of which each keeps its own tokens: gather's adjoint.

  Example:
    >>> from jax.sharding import Mesh, PartitionSpec as P
    >>> mesh = Mesh(jax.devices()[:1], "seq")
    >>> setting = Setting("seq", 1, "all_gather", "zigzag")
    >>> run = jax.shard_map(
    ...   lambda x: scatter(setting, x),
    ...   mesh=mesh,
    ...   in_specs=P("seq"),
    ...   out_specs=P(None, "seq"),
    ... )
    >>> jax.jit(run)(np.arange(8)[None]).tolist()  # of one device
    [[0, 1, 2, 3, 4, 5, 6, 7]]
  """
  if setting.layout == "zigzag":
    x = zigzag(x, setting.devices)
  return jax.lax.psum_scatter(x, setting.axis, scatter_dimension=1, tiled=True)


def to_heads(setting: Setting, x: Shaped[Array, "b t n ..."]) -> Any:
  """All tokens of some heads, from some tokens of all heads.

  Example:
    >>> from jax.sharding import Mesh, PartitionSpec as P
    >>> mesh = Mesh(jax.devices()[:1], "seq")
    >>> setting = Setting("seq", 1, "ulysses", "contiguous")
    >>> run = jax.shard_map(
    ...   lambda x: to_heads(setting, x),
    ...   mesh=mesh,
    ...   in_specs=P(None, "seq"),
    ...   out_specs=P(None, None, "seq"),
    ... )
    >>> x = jnp.arange(8).reshape(1, 4, 2)
    >>> bool((jax.jit(run)(x) == x).all())
    True
  """
  x = jax.lax.all_to_all(x, setting.axis, 2, 1, tiled=True)
  return _sorted(setting, x)


def to_tokens(setting: Setting, x: Shaped[Array, "b t n ..."]) -> Any:
  """Some tokens of all heads: what `to_heads` was given.

  Example:
    >>> from jax.sharding import Mesh, PartitionSpec as P
    >>> mesh = Mesh(jax.devices()[:1], "seq")
    >>> setting = Setting("seq", 1, "ulysses", "zigzag")
    >>> run = jax.shard_map(
    ...   lambda x: to_tokens(setting, to_heads(setting, x)),
    ...   mesh=mesh,
    ...   in_specs=P(None, "seq"),
    ...   out_specs=P(None, "seq"),
    ... )
    >>> x = jnp.arange(16).reshape(1, 8, 2)
    >>> bool((jax.jit(run)(x) == x).all())
    True
  """
  if setting.layout == "zigzag":
    x = zigzag(x, setting.devices)
  return jax.lax.all_to_all(x, setting.axis, 1, 2, tiled=True)


def _sorted(setting, x):
  return unzigzag(x, setting.devices) if setting.layout == "zigzag" else x
