"""A call divided over a mesh: each device has its rows and its heads.

Attention exchanges nothing between batch rows, nor between the heads of
different groups, so that a mesh's axes may divide both, and every device runs
the same call on less. XLA finds that out by itself for its own operations, but
a kernel is a closed box to it: it would gather the whole on every device.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Shaped

from isthmus.pallas.flash.api import Extras

#: Axes that divide rows and heads where nothing is said: `isthmus.train.mesh`
#: has the same names.
ROWS, HEADS = ("data", "fsdp"), ("model",)
#: The axis that divides the tokens of a row.
SEQ = "seq"


class Axes(NamedTuple):
  """Mesh axes that divide a call.

  Attributes:
    rows: names that divide the batch.
    heads: names that divide the query heads and the kv heads.

  Example:
    >>> Axes(rows=("data",))
    Axes(rows=('data',), heads=())
  """

  rows: tuple[str, ...] = ()
  heads: tuple[str, ...] = ()


def choose(
  b: int, n: int, k: int, shard_axes: Any = None, *, checked: bool = False
) -> Axes:
  """The axes of the current mesh (`jax.set_mesh`) that divide a call.

  By default rows are divided by `data` and `fsdp`, each if it is an Auto axis
  of the mesh that no enclosing `jax.shard_map` has made manual, and if it
  divides the rows that are left; and heads by `model`. A size that some axis
  doesn't divide is refused, but for rows by default (a batch of 1, as
  generation has, runs on any mesh), and for kv heads of which every device
  reads one: those are copied.

  Args:
    b: batch rows.
    n: query heads.
    k: kv heads.
    shard_axes: (batch axes, head axes), each a name, names, or None for the
      default; None is (None, None), and ((), ()) divides nothing.
    checked: the call is within a `jax.shard_map` that checks how values vary.
      It isn't divided further there: jax (0.10 to 0.12) can't differentiate
      such a nest.

  Raises:
    ValueError: heads or rows that an axis doesn't divide; a named axis that
      the mesh lacks, that is manual or that is named twice.
    NotImplementedError: axes are named, and `checked`.

  Example:
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    >>> with jax.set_mesh(mesh):
    ...   choose(8, 4, 2)  # one device has nothing to divide
    Axes(rows=(), heads=())
  """
  named_rows, named_heads = _pair(shard_axes)
  mesh = jax.sharding.get_abstract_mesh()
  for name in (*(named_rows or ()), *(named_heads or ())):
    _check_name(name, mesh)
  free = _free(mesh)
  rows, heads = (
    tuple(x for x in names if x in free and x not in (taken or ()))
    for names, taken in (
      (ROWS if named_rows is None else named_rows, named_heads),
      (HEADS if named_heads is None else named_heads, named_rows),
    )
  )
  if named_rows is None:
    rows = _dividing(b, rows, free)
  if checked:
    if (named_rows and rows) or (named_heads and heads):
      raise NotImplementedError(
        f"shard_axes {shard_axes!r} within a jax.shard_map that checks how"
        " values vary: jax can't differentiate it; pass check_vma=False there"
      )
    return Axes()
  across = math.prod(free[name] for name in heads)
  _check_divides("a batch of", b, rows, free, "((), None)")
  _check_divides("query heads:", n, heads, free, "(None, ())")
  if across % k:
    _check_divides("kv heads:", k, heads, free, "(None, ())")
  return Axes(rows, heads)


def place(x: Shaped[Array, "b t ..."]) -> Shaped[Array, "b t ..."]:
  """Activations where they belong: rows by `data` and `fsdp`, tokens by `seq`.

  XLA would follow the parameters, which `fsdp` divides by width, and send
  activations to and fro. An axis that the current mesh lacks, that is manual
  or that doesn't divide is left out.

  Example:
    >>> place(jnp.ones((4, 8, 16))).shape  # no mesh
    (4, 8, 16)
  """
  free = _free(jax.sharding.get_abstract_mesh())
  spec = tuple(
    _dividing(size, [name for name in names if name in free], free) or None
    for size, names in zip(x.shape[:2], (ROWS, (SEQ,)), strict=True)
  )
  if spec == (None, None):
    return x
  return _constrain(x, PartitionSpec(*spec))


def widen(x: Float[Array, "v m"]) -> Float[Array, "v m"]:
  """A table whose columns no axis of the mesh divides; its rows as they are.

  Rows that are looked up in it are divided otherwise than it is.

  Example:
    >>> widen(jnp.ones((16, 4))).shape  # no mesh
    (16, 4)
  """
  if not _free(jax.sharding.get_abstract_mesh()):
    return x
  spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
  return _constrain(x, spec)


def sharded(
  function: Callable[..., Any],
  arrays: tuple[Any, ...],
  labels: tuple[Any, ...],
  out: Any,
  *,
  sizes: tuple[int, int, int],
  shard_axes: Any = None,
  seq: str | None = None,
) -> Any:
  """`function(*arrays)`, run by every device on its rows and heads.

  Args:
    function: of arrays; what it returns for some rows and heads doesn't
      depend on the others.
    arrays: pytrees.
    labels: a prefix of that tree; each leaf spells an array's first axes: `b`
      batch, `n` query heads, `k` kv heads, `t` tokens, `.` any other. An axis
      of size 1 is copied.
    out: the same for what is returned.
    sizes: (batch rows, query heads, kv heads).
    shard_axes: see `choose`; where it divides nothing, this is the plain call.
    seq: the axis that divides tokens too; `function` is to know of it.

  Example:
    >>> def scale(x, factor):
    ...   return x * factor
    >>> call = (scale, (jnp.ones((4, 3, 2)), 2.0), ("b.n", ""), "b.n")
    >>> sharded(*call, sizes=(4, 2, 2)).shape
    (4, 3, 2)
  """
  checked = any(_varying(x) for x in jax.tree.leaves(arrays))
  axes = choose(*sizes, shard_axes, checked=checked)
  if not (axes.rows or axes.heads or seq):
    return function(*_alike(arrays))
  mesh, k = jax.sharding.get_abstract_mesh(), sizes[2]
  across = math.prod(mesh.shape[name] for name in axes.heads)
  # Where there are fewer kv heads than devices, each picks the one it reads.
  few = k % across != 0
  names = {"b": axes.rows, "n": axes.heads, "k": () if few else axes.heads}
  names |= {".": (), "t": () if seq is None else (seq,)}
  labels = jax.tree.broadcast(labels, arrays)

  def spec(x, label):
    sizes = zip(label, jnp.shape(x), strict=False)
    return PartitionSpec(
      *(None if size == 1 else names[a] or None for a, size in sizes)
    )

  def pick(device, x, label):
    axis = label.find("k")
    if axis < 0 or x.shape[axis] == 1:
      return x
    head = device[0] * k // across
    return jax.lax.dynamic_slice_in_dim(x, head, 1, axis)

  def local(device, *arrays):
    if few:
      take = functools.partial(pick, device)
      arrays = jax.tree.map(take, arrays, labels)
    return function(*arrays)

  # What is left to XLA inside; an axis of one device needn't be.
  left = {
    name
    for name, size in mesh.shape.items()
    if size > 1 and name not in (*axes.rows, *axes.heads, seq)
  }
  call = jax.shard_map(
    local,
    in_specs=(
      PartitionSpec(axes.heads or None),
      *jax.tree.map(spec, arrays, labels),
    ),
    out_specs=jax.tree.map(
      lambda label: PartitionSpec(*(names[a] or None for a in label)), out
    ),
    axis_names=set(mesh.axis_names) - left - set(mesh.manual_axes),
    # Kernels don't say how their results vary. Every axis divides a result,
    # so that there is nothing to check.
    check_vma=False,
  )
  # Outside jit, jax can't run a map over a part of a mesh.
  call = jax.jit(call) if left else call
  return call(jnp.arange(across, dtype=jnp.int32), *arrays)


def attend_sharded(
  function: Callable[..., Any],
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  extras: Extras,
  *,
  rows: tuple[Float[Array, "b n t"], ...] = (),
  shard_axes: Any = None,
  out: Any = ("b.n", "bn"),
) -> Any:
  """`function(q, k, v, extras, *rows)`, divided over the current mesh.

  Args:
    function: an implementation of attention, its options bound.
    q, k, v, extras, rows: its arguments.
    shard_axes: see `choose`.
    out: labels of what it returns, as in `sharded`; by default (o, lse).

  Example:
    >>> from isthmus.pallas.flash.api import Options
    >>> from isthmus.pallas.flash.ref import attend
    >>> call = lambda *arrays: attend(*arrays, options=Options())
    >>> q = k = v = jnp.ones((2, 4, 2, 8))
    >>> o, lse = attend_sharded(call, q, k, v, Extras())
    >>> o.shape, lse.shape
    ((2, 4, 2, 8), (2, 2, 4))
  """
  (b, _, n, _), heads = q.shape, k.shape[2]
  if extras.dropout_key is not None:
    indices = tuple(jnp.arange(size, dtype=jnp.int32) for size in (b, n))
    extras = extras._replace(first=indices)

  def local(q, k, v, extras, *rest):
    if extras.first is not None:
      first = jnp.stack([x[0] for x in extras.first])
      extras = extras._replace(first=first)
    return function(q, k, v, extras, *rest)

  like = Extras(
    lists="bn",
    q=("bn",) * len(extras.q),
    k=("bk",) * len(extras.k),
    sinks="n",
    dropout_key="",
    first=None if extras.first is None else ("b", "n"),
  )
  return sharded(
    local,
    (q, k, v, extras, *rows),
    ("b.n", "b.k", "b.k", like, *["bn"] * len(rows)),
    out,
    sizes=(b, n, heads),
    shard_axes=shard_axes,
  )


def _pair(shard_axes: Any):
  """(batch axes, head axes), each a tuple of names, or None."""
  if shard_axes is None:
    return None, None
  if isinstance(shard_axes, str) or len(shard_axes) != 2:
    raise ValueError(
      f"shard_axes is {shard_axes!r}; it is (batch axes, head axes)"
    )
  rows, heads = (
    (names,) if isinstance(names, str) else names and tuple(names)
    for names in shard_axes
  )
  named = (*(rows or ()), *(heads or ()))
  for name in named:
    if named.count(name) > 1:
      raise ValueError(f"shard_axes names {name!r} twice")
  return rows, heads


def _check_name(name, mesh) -> None:
  if name not in mesh.shape:
    has = ", ".join(mesh.axis_names) or "no axes: jax.set_mesh sets one"
    raise ValueError(f"shard_axes names {name!r}; the mesh has {has}")
  if (kind := _kind(mesh, name)) != AxisType.Auto:
    raise ValueError(
      f"shard_axes names {name!r}, which is {kind.name} here, not Auto"
    )


def _check_divides(what, size, names, free, rest) -> None:
  count = math.prod(free[name] for name in names)
  if size % count:
    raise ValueError(
      f"{what} {size} is not a multiple of the {count} devices of mesh axis"
      f" {'+'.join(names)}; shard_axes={rest} leaves it whole"
    )


# Outside of jit, jax can't constrain what lies on one device.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def _constrain(x, spec):
  return jax.lax.with_sharding_constraint(x, spec)


def _free(mesh):
  """Sizes of the axes that may divide something."""
  return {
    name: size
    for name, size in mesh.shape.items()
    if size > 1 and _kind(mesh, name) == AxisType.Auto
  }


def _kind(mesh, name):
  return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[name]


def _dividing(size, names, free):
  """Of `names` in turn those that divide what is left of `size`."""
  taken = []
  for name in names:
    if size % free[name] == 0:
      taken.append(name)
      size //= free[name]
  return tuple(taken)


def _varying(x) -> frozenset:
  """Axes of an enclosing, checked `shard_map` that x differs along."""
  return jax.typeof(x).manual_axis_type.varying


def _alike(arrays):
  """`arrays`, varying along the same axes: what a custom rule's have to do."""
  every = frozenset().union(*map(_varying, jax.tree.leaves(arrays)))

  def spread(x):
    missing = tuple(sorted(every - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(spread, arrays) if every else arrays
