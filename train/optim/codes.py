"""Which optimiser states are kept in eight bits, and in which blocks."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from isthmus.pallas.quant8 import api
from isthmus.pallas.quant8.api import QTensor
from isthmus.pallas.quant8.blocks import Blocks
from isthmus.pallas.quant8.maps import Map
from isthmus.train.mesh import P, Rules, path_name


class Moment(NamedTuple):
  """A moment of every parameter: the fields of their `QTensor`s as trees.

  Trees come first and fields last in no path, so that `codes/mlp/up/kernel`
  ends as the parameter's does: a sharding rule that finds a parameter finds
  its codes and scales too.

  Attributes:
    codes: like the parameters, each uint8 in its shape; float32 where the
      state is kept whole.
    absmax: like the parameters, the scales; None where it is kept whole.

  Example:
    >>> moment = Codes(min_size=4).zeros({"w": jnp.ones((2, 4))}, api.SIGNED)
    >>> [path_name(path) for path, _ in jax.tree.leaves_with_path(moment)]
    ['codes/w', 'absmax/w']
  """

  codes: Any
  absmax: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes:
  """Which parameters have states of eight bits, and how these are cut.

  Blocks lie along one axis of a parameter, one that no rule splits over
  devices where there is one: the last that is as long as a block, or else the
  longest. Then every device has the scales of what it holds, and nothing
  moves. On a split axis, a block has to divide what a device holds.

  Attributes:
    block: numbers of a block, a power of two.
    min_size: parameters with fewer numbers keep float32 states.
    whole: regex; parameters whose path it finds keep float32 states, or None.
      Tables of embeddings do: their gradients are few and uneven.
    mask: a tree of bools like the parameters, or a function of them that
      gives one: False keeps float32 states. None is True throughout.
    rules: of sharding, those of the job.
    flat: blocks in row-major order, for comparison with other libraries; such
      a state can't be divided over devices.

  Example:
    >>> codes = Codes(rules=[("down/kernel$", P(None, "model"))])
    >>> codes.blocks("mlp/down/kernel", (1024, 512)).scales
    (4, 512)
    >>> codes.blocks("mlp/up/kernel", (1024, 512)).scales
    (1024, 2)
    >>> print(codes.blocks("embed/embedding", (1024, 512)))
    None
  """

  block: int = 256
  min_size: int = 4096
  whole: str | None = "embed"
  mask: Any = None
  rules: Rules = ()
  flat: bool = False

  def __post_init__(self):
    Blocks((1,), self.block, -1)
    if self.min_size < 0:
      raise ValueError(f"min_size is {self.min_size}; it is at least 0")
    if self.flat and self.rules:
      raise ValueError("flat blocks can't be divided by sharding rules")

  def blocks(self, name: str, shape: tuple[int, ...]) -> Blocks | None:
    """How a parameter's state is cut; None if it is kept whole.

    Args:
      name: its path.
      shape: its shape.

    Raises:
      ValueError: every axis is split, and blocks don't fit the last one.
    """
    if not shape or math.prod(shape) < max(self.min_size, 1):
      return None
    if self.whole is not None and re.search(self.whole, name):
      return None
    if self.flat:
      return Blocks(shape, self.block, None)
    spec = self.spec(name, len(shape))
    free = [i for i, axes in enumerate(spec) if axes is None]
    if not free:
      if shape[-1] % self.block:
        raise ValueError(
          f"{name} {shape} is split along every axis, and blocks of "
          f"{self.block} don't fit {shape[-1]}; take smaller ones, or keep it "
          "whole"
        )
      free = [len(shape) - 1]
    long = [i for i in free if shape[i] >= self.block]
    axis = long[-1] if long else max(free, key=lambda i: (shape[i], i))
    return Blocks(shape, self.block, axis - len(shape))

  def spec(self, name: str, ndim: int) -> P:
    """The PartitionSpec that the rules give a parameter, one entry an axis."""
    for pattern, spec in self.rules:
      if re.search(pattern, name):
        return P(*(None,) * (ndim - len(spec)), *spec)
    return P(*(None,) * ndim)

  def plan(self, params: Any) -> list[tuple[str, Blocks | None]]:
    """Name and blocks of each parameter, in the order of leaves."""
    mask = self.mask(params) if callable(self.mask) else self.mask
    if mask is None:
      mask = jax.tree.map(lambda _: True, params)
    wanted = jax.tree.structure(params).flatten_up_to(mask)
    found = []
    for (path, leaf), coded in zip(
      jax.tree.leaves_with_path(params), wanted, strict=True
    ):
      name = path_name(path)
      found.append((name, self.blocks(name, leaf.shape) if coded else None))
    return found

  def zeros(self, params: Any, map: Map) -> Moment:
    """A moment of zeros."""
    leaves, tree = jax.tree.flatten(params)
    parts = []
    for leaf, (_, blocks) in zip(leaves, self.plan(params), strict=True):
      if blocks is None:
        parts.append((jnp.zeros(leaf.shape, jnp.float32), None))
      else:
        q = api.zeros(leaf.shape, map=map, block=blocks.size, axis=blocks.axis)
        parts.append((q.codes, q.absmax))
    return join(tree, parts)

  def state_bytes(self, params: Any, moments: int = 2) -> int:
    """Bytes of the states: a byte a number and four a block, or four each.

    Args:
      params: the parameters, or their shapes.
      moments: how many an optimiser has; Adam has two.

    Example:
      >>> Codes().state_bytes({"w": jnp.ones((1024, 1024)), "b": jnp.ones(8)})
      2129984
    """
    leaves, total = jax.tree.leaves(params), 0
    for leaf, (_, blocks) in zip(leaves, self.plan(params), strict=True):
      size = math.prod(leaf.shape)
      total += (
        4 * size if blocks is None else size + 4 * math.prod(blocks.scales)
      )
    return moments * total


def join(tree: Any, parts: list[tuple[Any, Any]]) -> Moment:
  """A moment of pairs (codes, absmax) in the order of leaves.

  Example:
    >>> join(jax.tree.structure({"w": 0}), [(1, 2)])
    Moment(codes={'w': 1}, absmax={'w': 2})
  """
  codes, absmax = zip(*parts, strict=True) if parts else ((), ())
  return Moment(tree.unflatten(codes), tree.unflatten(absmax))


def tensors(moment: Moment, tree: Any, plan: Any, map: Map) -> list[Any]:
  """Each parameter's `QTensor`, or its float32 state, in the order of leaves.

  Args:
    moment: of the parameters.
    tree: their structure.
    plan: of `Codes.plan`.
    map: what codes stand for.

  Example:
    >>> codes, params = Codes(min_size=4), {"w": jnp.ones((2, 4))}
    >>> moment = codes.zeros(params, api.SIGNED)
    >>> tree, plan = jax.tree.structure(params), codes.plan(params)
    >>> tensors(moment, tree, plan, api.SIGNED)[0].shape
    (2, 4)
  """
  return [
    c if b is None else QTensor(c, a, map, b.size, b.axis)
    for c, a, (_, b) in zip(
      tree.flatten_up_to(moment.codes),
      tree.flatten_up_to(moment.absmax),
      plan,
      strict=True,
    )
  ]
