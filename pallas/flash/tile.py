"""What the Mosaic GPU kernels share: calls, masks of a tile, accumulators."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from isthmus.pallas.compat import interpreted as interpreted
from isthmus.pallas.compat import interpreting
from isthmus.pallas.flash.predicate import Band

#: Tokens of a listed tile, of queries and of keys.
BLOCK = 128
#: Rows of a warpgroup's matrix instruction.
ROWS = 64


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a kernel walks, and the arrays it walks along.

  Attributes:
    lengths: (t, s), queries and keys that count; arrays may be longer.
    band: what is seen, where there are no lists.
    lists: `Lists` of tiles of BLOCK x BLOCK, or None.
    order: int32 [b|1, n|1, rows], the rows of tiles by falling work, or None.
    q, k: operands of the predicate, padded to whole tiles.
    sinks: float32 [n], or None.
    steps: how many tiles a tile meets, about, or inf.

  Example:
    >>> Plan((256, 256), band=Band(None, 0)).masked(None)
    True
  """

  lengths: tuple[int, int]
  band: Band = Band(None, None)
  lists: Any = None
  order: Any = None
  q: tuple[Any, ...] = ()
  k: tuple[Any, ...] = ()
  sinks: Any = None
  steps: float = math.inf

  def arrays(self) -> dict[str, Any]:
    """The arrays, by name."""
    names = ("lists", "order", "q", "k", "sinks")
    return {name: getattr(self, name) for name in names}

  def masked(self, length: int | None) -> bool:
    """Whether the walk may meet partial tiles; `length` as in element_mask."""
    if self.lists is not None:
      return self.lists.partial is not None
    band = (self.band.left, self.band.right)
    return length is not None or band != (None, None)


def div(a: Any, b: int) -> Any:
  """a // b of int32 that are not negative.

  Example:
    >>> int(div(jnp.int32(7), 2))
    3
  """
  return lax.div(a, jnp.int32(b))


def rem(a: Any, b: int) -> Any:
  """a % b of int32 that are not negative.

  Example:
    >>> int(rem(jnp.int32(7), 4))
    3
  """
  return lax.rem(a, jnp.int32(b))


def entry(ref: Any, *at: Any) -> Any:
  """ref[at], axes of size 1 being shared.

  Example:
    >>> int(entry(jnp.array([[3, 5]]), 4, 1))
    5
  """
  shared = zip(at, ref.shape, strict=False)
  return ref[tuple(0 if size == 1 else x for x, size in shared)]


class _Sum:
  """An accumulator for the interpreter, whose wgmma reads memory only."""

  def __init__(self, value):
    self.value = value


def wgmma(acc: Any, a: Any, b: Any) -> None:
  """`acc += a b`, started; a is in registers or shared memory.

  Example:
    >>> x = jnp.full((2, 2), 3.0)
    >>> with interpreted():
    ...   print(accumulate(x, lambda acc: wgmma(acc, x, x)))
    [[21. 21.]
     [21. 21.]]
  """
  if isinstance(acc, _Sum):
    acc.value += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
  else:
    plgpu.wgmma(acc, a, b)


def accumulate(start: Any, multiply: Callable[[Any], None]) -> Any:
  """`start` plus what `multiply(acc)` adds by `wgmma`.

  Example:
    >>> x = jnp.ones((1, 2))
    >>> with interpreted():
    ...   print(accumulate(x, lambda acc: wgmma(acc, x, jnp.eye(2))))
    [[2. 2.]]
  """
  if interpreting():
    acc = _Sum(start)
    multiply(acc)
    return acc.value

  def inner(ref):
    ref[...] = start
    multiply(ref)
    return ref[...]

  return pl.run_scoped(inner, plgpu.ACC(start.shape, jnp.float32))


def product(shape: tuple[int, int], multiply: Callable[[Any], None]) -> Any:
  """What `multiply(acc)` adds by `wgmma`, from zero.

  Example:
    >>> x = jnp.ones((1, 3))
    >>> with interpreted():
    ...   print(product((1, 1), lambda acc: wgmma(acc, x, x.T)))
    [[3.]]
  """
  if interpreting():
    return accumulate(jnp.zeros(shape, jnp.float32), multiply)

  def inner(ref):
    multiply(ref)
    return ref[...]

  return pl.run_scoped(inner, plgpu.ACC(shape, jnp.float32))


def products(
  shape: tuple[int, int],
  first: Callable[[Any], None],
  use: Callable[[Any], Any],
  start: Any,
  second: Callable[[Any], None],
) -> tuple[Any, Any]:
  """(use(a), b) of two products; `use` runs while b is being computed.

  Args:
    shape: of a.
    first: starts a, from zero.
    use: what is done with a.
    start: what b is added to, or a shape for zero.
    second: starts b.

  Example:
    >>> x = jnp.ones((1, 1))
    >>> one = lambda acc: wgmma(acc, x, x)
    >>> with interpreted():
    ...   print(*products((1, 1), one, jnp.negative, (1, 1), one))
    [[-1.]] [[1.]]
  """
  zero = isinstance(start, tuple)
  if interpreting():
    used = use(product(shape, first))
    return used, (product if zero else accumulate)(start, second)

  def inner(a, b):
    if not zero:
      b[...] = start
    first(a)
    second(b)
    used = use(plgpu.wgmma_accumulator_load(a, wait_n=1))
    return used, b[...]

  shapes = (shape, start if zero else start.shape)
  return pl.run_scoped(inner, *(plgpu.ACC(x, jnp.float32) for x in shapes))


def filled(shape, value):
  """A constant in the layout of an accumulator, or of its rows.

  Example:
    >>> jax.eval_shape(lambda: filled((64,), 0.0)).dtype
    dtype('float32')
  """
  layout = plgpu.Layout.WGMMA
  layout = layout if len(shape) == 2 else layout.reduce(1)
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def spread(x, shape, axis):
  """A vector along `axis` of a tile.

  Example:
    >>> print(spread(jnp.array([1, 2]), (2, 2), 0))
    [[1 1]
     [2 2]]
  """
  return lax.broadcast_in_dim(x, shape, [axis])


def where_partial(partial: Any, step: Any, x: Any, other: float, seen: Any):
  """x, but `other` where an element of a partial tile is not seen.

  A branch inside one loop, not a loop for partial tiles and one for the rest:
  with two, ptxas runs the matrix instructions one after the other.

  Args:
    partial: steps below it are of partial tiles.
    step: the one x belongs to.
    x: a tile.
    other: what stands for elements that are not seen.
    seen: gives the `element_mask`, or None.

  Example:
    >>> x, seen = jnp.ones(2), lambda: jnp.array([True, False])
    >>> print(*(where_partial(1, step, x, 0.0, seen) for step in (0, 1)))
    [1. 0.] [1. 1.]
  """

  def mask(x):
    found = seen()
    return x if found is None else jnp.where(found, x, other)

  return lax.cond(step < partial, mask, lambda x: x, x)


def element_mask(refs, predicate, at, base, shape, *, queries, length):
  """Which elements of a tile are seen.

  Args:
    refs: the plan's arrays.
    predicate: over (i, j) and the operands, or None.
    at: (batch, query head, kv head).
    base: (first query, first key).
    shape: of the tile.
    queries: the axis of the tile that holds queries, 0 or 1.
    length: keys there are, if the last tile is not whole; else None.

  Example:
    >>> refs, at, base = {"q": (), "k": ()}, (0, 0, 0), (0, 0)
    >>> mask = lambda: element_mask(
    ...   refs, Band(None, 0), at, base, (64, 64), queries=0, length=None
    ... )
    >>> jax.eval_shape(mask).shape
    (64, 64)
  """
  keys = 1 - queries
  iota = functools.partial(
    plgpu.broadcasted_iota, jnp.int32, shape, layout=plgpu.Layout.WGMMA
  )
  i, j = iota(queries) + base[0], iota(keys) + base[1]

  def operand(ref, head, start, axis):
    batch = 0 if ref.shape[0] == 1 else at[0]
    head = 0 if ref.shape[1] == 1 else head
    x = plgpu.load(
      ref.at[batch, head, pl.ds(start, shape[axis])],
      layout=plgpu.Layout.WGMMA.reduce(1 - axis),
      optimized=False,
    )
    return spread(x, shape, axis)

  seen = None
  if predicate is not None:
    q = tuple(operand(x, at[1], base[0], queries) for x in refs["q"])
    k = tuple(operand(x, at[2], base[1], keys) for x in refs["k"])
    seen = predicate(i, j, q, k)
  if length is not None:
    inside = j < length
    seen = inside if seen is None else seen & inside
  return seen


def call(body, arrays, plan, *, out_type, scratch, items, threads, name):
  """Runs `body(*refs of arrays, plan's refs, *refs of outputs, scratch)`.

  Args:
    body: the kernel of one CTA; axes "item" and "wg".
    arrays: inputs.
    plan: a `Plan`.
    out_type: a tuple of shapes and dtypes.
    scratch: shared memory and barriers.
    items: CTAs.
    threads: warpgroups.
    name: of the kernel, for profiles.

  Example:
    >>> def copy(x_ref, plan, y_ref, scratch):
    ...   y_ref[lax.axis_index("item")] = x_ref[lax.axis_index("item")]
    >>> run = lambda x: call(
    ...   copy,
    ...   (x,),
    ...   Plan((2, 2)),
    ...   out_type=(jax.ShapeDtypeStruct((2,), jnp.int32),),
    ...   scratch=(),
    ...   items=2,
    ...   threads=1,
    ...   name="copy",
    ... )
    >>> jax.eval_shape(run, jnp.arange(2))[0].shape
    (2,)
  """
  leaves, tree = jax.tree.flatten(plan.arrays())
  counts = (len(arrays), len(leaves), len(out_type))

  def kernel(*refs):
    first, second = counts[0], counts[0] + counts[1]
    third = second + counts[2]
    named = jax.tree.unflatten(tree, refs[first:second])
    body(*refs[:first], named, *refs[second:third], refs[third:])

  return launch(
    kernel,
    (*arrays, *leaves),
    out_type=out_type,
    scratch=scratch,
    items=items,
    threads=threads,
    name=name,
  )


def launch(body, arrays, *, out_type, scratch, items, threads, name):
  """Runs `body(*refs of arrays, *refs of outputs, *refs of scratch)`.

  Args:
    body, out_type, scratch, items, threads, name: as in `call`.
    arrays: inputs.

  Example:
    >>> def copy(x_ref, y_ref):
    ...   y_ref[lax.axis_index("item")] = x_ref[lax.axis_index("item")]
    >>> run = lambda x: launch(
    ...   copy,
    ...   (x,),
    ...   out_type=(jax.ShapeDtypeStruct((2,), jnp.int32),),
    ...   scratch=(),
    ...   items=2,
    ...   threads=1,
    ...   name="copy",
    ... )
    >>> jax.eval_shape(run, jnp.arange(2))[0].shape
    (2,)
  """
  return plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch,
    grid=(items,),
    grid_names=("item",),
    num_threads=threads,
    thread_name="wg",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
  )(*arrays)


def drain(total: Any, stages: int, *barriers: Any) -> None:
  """Waits until the last steps' buffers have been let go.

  Example:
    >>> drain(3, 2)  # without barriers there is nothing to wait for
    >>> drain(0, 0) is None
    True
  """
  for back in range(stages):

    @pl.when(total > back)
    def _(back=back):
      slot = rem(total - 1 - back, stages)
      for barrier in barriers:
        plgpu.barrier_wait(barrier.at[slot])


def tiled(shape, dtype):
  """Shared memory in the layout that wgmma reads.

  Example:
    >>> tiled((2, 64, 128), jnp.bfloat16).shape
    (2, 64, 128)
  """
  tiling: Any = plgpu.TilingTransform  # whose base reads as an abstract class
  swizzle: Any = plgpu.SwizzleTransform
  transforms = (tiling((8, 64)), swizzle(128))
  return plgpu.SMEM(shape, dtype, transforms=transforms)
