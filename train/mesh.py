"""Devices in a mesh, and where every array of a run lives on it.

Axis names are the same everywhere in the library:

* `data`: rows of the batch; parameters are copied.
* `fsdp`: rows of the batch; parameters are split and gathered when used.
* `model`: the width of the layers (tensor parallelism).
* `seq`: the tokens of a sequence; attention goes round its devices. Tasks that
  can be divided so have a method `divide`, see `isthmus.train.sequence`.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

#: Short for jax.sharding.PartitionSpec.
P = PartitionSpec
#: Names of a mesh's axes, in order.
AXES = ("data", "fsdp", "model", "seq")
#: The leading axis of every batch.
ROWS = P(("data", "fsdp"))
#: Pairs of a regex on a parameter's path and its spec.
Rules = Sequence[tuple[str, PartitionSpec]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
  """How many devices each axis takes; one axis may be -1, for all the rest.

  Example:
    >>> Mesh(fsdp=1).build().axis_names
    ('data', 'fsdp', 'model', 'seq')
  """

  data: int = -1
  fsdp: int = 1
  model: int = 1
  seq: int = 1

  def __post_init__(self):
    sizes = [getattr(self, a) for a in AXES]
    for axis, size in zip(AXES, sizes, strict=True):
      if size < 1 and size != -1:
        raise ValueError(f"mesh.{axis} is {size}; it is at least 1, or -1")
    if sizes.count(-1) > 1:
      raise ValueError(f"mesh {tuple(sizes)}: one axis at most may be -1")

  def shape(self, num_devices: int) -> tuple[int, ...]:
    """Sizes in the order of `AXES`, with -1 resolved.

    Raises:
      ValueError: the axes don't multiply to the number of devices.
    """
    sizes = [getattr(self, a) for a in AXES]
    given = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
      sizes[sizes.index(-1)] = max(1, num_devices // given)
    if math.prod(sizes) != num_devices:
      wanted = " x ".join(
        f"{a}={getattr(self, a)}" for a in AXES if getattr(self, a) != 1
      )
      raise ValueError(
        f"mesh {wanted or 'of one device'} does not fill {num_devices} devices"
      )
    return tuple(sizes)

  def build(
    self, devices: Sequence[jax.Device] | None = None
  ) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: all), with Auto axes."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
      self.shape(len(devices)),
      AXES,
      axis_types=(AxisType.Auto,) * len(AXES),
      devices=devices,
    )


def path_name(path: Sequence[Any]) -> str:
  """`params/block_00/mlp/up/kernel` for a path of jax.tree_util.

  Example:
    >>> tree = {"block_00": {"mlp": {"kernel": 1.0}}}
    >>> [path_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
    ['block_00/mlp/kernel']
  """
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def shardings(tree: Any, rules: Rules, mesh: jax.sharding.Mesh) -> Any:
  """A NamedSharding for each leaf: the first rule whose regex finds its path.

  A spec is aligned with a leaf's *last* axes, so that one rule serves a
  layer's kernel `[m, f]` and the same kernels stacked, `[depth, m, f]`. A
  leaf that no rule finds is copied to every device, as scalars are.

  Args:
    tree: arrays or ShapeDtypeStructs, the whole training state.
    rules: pairs of a regex, searched in `path_name`, and a PartitionSpec.
    mesh: the mesh.

  Raises:
    ValueError: a rule that finds nothing, a spec that is longer than a
      leaf's shape, an axis that doesn't divide, or an axis the mesh lacks.

  Example:
    >>> mesh = Mesh(data=1, fsdp=-1).build()
    >>> tree = {"kernel": jnp.zeros((16, 4)), "scale": jnp.ones(4)}
    >>> placed = shardings(tree, [("kernel$", P("fsdp", None))], mesh)
    >>> tuple(placed["kernel"].spec), tuple(placed["scale"].spec)
    (('fsdp', None), ())
  """
  used = [False] * len(rules)

  def place(path, leaf):
    name = path_name(path)
    if not leaf.shape:
      return NamedSharding(mesh, P())
    for i, (pattern, spec) in enumerate(rules):
      if re.search(pattern, name):
        used[i] = True
        return NamedSharding(mesh, _align(name, leaf.shape, spec, mesh))
    return NamedSharding(mesh, P())

  placed = jax.tree.map_with_path(place, tree)
  for done, (pattern, _) in zip(used, rules, strict=True):
    if not done:
      names = [path_name(p) for p, _ in jax.tree.leaves_with_path(tree)]
      raise ValueError(
        f"sharding rule {pattern!r} finds no parameter; the state has "
        + ", ".join(names[:8])
        + (" ..." if len(names) > 8 else "")
      )
  return placed


def _align(name, shape, spec, mesh) -> PartitionSpec:
  if len(spec) > len(shape):
    raise ValueError(
      f"sharding of {name}: {spec} names {len(spec)} axes, "
      f"the array {tuple(shape)} has {len(shape)}"
    )
  spec = P(*(None,) * (len(shape) - len(spec)), *spec)
  for size, axes in zip(shape, spec, strict=True):
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    for axis in axes:
      if axis not in mesh.shape:
        raise ValueError(
          f"sharding of {name}: the mesh has no axis {axis!r}, "
          f"only {tuple(mesh.shape)}"
        )
    parts = math.prod(mesh.shape[a] for a in axes)
    if size % parts:
      raise ValueError(
        f"sharding of {name} {tuple(shape)}: {size} is not divisible by "
        f"{parts} devices of {'+'.join(axes)}"
      )
  return spec


def structs(tree: Any, placed: Any) -> Any:
  """ShapeDtypeStructs that carry shardings: what a checkpoint restores into.

  Example:
    >>> tree = {"w": jnp.zeros(4)}
    >>> target = structs(tree, shardings(tree, [], Mesh().build()))
    >>> target["w"].shape, target["w"].sharding.is_fully_replicated
    ((4,), True)
  """
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    placed,
  )
