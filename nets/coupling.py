"""Two streams and the branches between them: layers run, and walked back.

What `isthmus.nets.reversible` is built of. A branch's dx is rounded to the
grid of the streams before it is added, so that it can be taken away again.
"""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from isthmus.pallas.precision import accumulator

Pair = tuple[Float[Array, "..."], Float[Array, "..."]]


@runtime_checkable
class Branch(Protocol):
  """What is added to a stream: `f(params, x, *, key, state, aux)`.

  It gets one layer's parameters, key and state, and the aux of all layers; it
  returns dx, of x's shape, and the layer's new state.
  """

  def __call__(
    self,
    params: Any,
    x: Float[Array, "..."],
    /,
    *,
    key: Any,
    state: Any,
    aux: Any,
  ) -> tuple[Float[Array, "..."], Any]: ...


class Layers(NamedTuple):
  """The layers of a stack.

  Attributes:
    f, g: the branches.
    arrays: (params, keys, states) of f, and of g, every leaf with a leading
      axis of depth.
    depth: number of layers.

  Example:
    >>> w = jnp.ones((3, 4, 4))
    >>> stack = Layers.of(None, None, (w, w), jax.random.key(0), None)
    >>> jax.tree.map(jnp.shape, stack.layer(0)[0])
    ((4, 4), (), None)
  """

  f: Branch
  g: Branch
  arrays: tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]
  depth: int

  @classmethod
  def of(cls, f, g, params, keys, state) -> "Layers":
    """Checked; see `isthmus.nets.reversible.reversible_stack`."""
    params, state = jax.tree.map(jnp.asarray, (params, state))
    leaves = jax.tree.leaves((params, state))
    if not jax.tree.leaves(params):
      raise ValueError("params hold no array, so no depth")
    depths = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(depths) > 1 or () in depths or (0,) in depths:
      raise ValueError(
        "the leading axes of params and state are one depth of at least 1;"
        f" they are {sorted(depths)}"
      )
    ((depth,),) = depths
    (pf, pg), (sf, sg) = params, state or (None, None)
    kf, kg = _keys(keys, depth)
    return cls(f, g, ((pf, kf, sf), (pg, kg, sg)), depth)

  def layer(self, i: Any) -> Any:
    """`arrays` of one layer."""
    pick = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return jax.tree.map(pick, self.arrays)

  def check(self, x: Pair, aux: Any, *, closed: bool) -> list[Any]:
    """Traces each branch once, and says what is wrong with it.

    Args:
      x: the streams.
      aux: what all layers read.
      closed: whether a branch may depend on its arguments alone.

    Returns:
      What f and g add, as shapes and dtypes.
    """
    added = []
    branches = ("f", self.f), ("g", self.g)
    for (name, branch), one in zip(branches, self.layer(0), strict=True):

      def call(one, x, aux, branch=branch):
        p, key, state = one
        return branch(p, x, key=key, state=state, aux=aux)

      jaxpr, out = jax.make_jaxpr(call, return_shape=True)(one, x[0], aux)
      if not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(f"{name} returns (dx, state), not {type(out)}")
      dx, state = out
      if getattr(dx, "shape", None) != x[0].shape:
        raise ValueError(
          f"{name} adds {getattr(dx, 'shape', dx)} to a stream {x[0].shape}"
        )
      if jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, one[2]):
        raise ValueError(f"{name} returns a state of another form: {state}")
      shut = [c for c in jaxpr.consts if isinstance(c, Tracer)]
      if closed and shut:
        kinds = ", ".join(str(jax.typeof(c)) for c in shut)
        raise ValueError(
          f"{name} closes over traced arrays ({kinds}), whose gradient would"
          " be lost: pass them as aux, or choose another mode"
        )
      added.append(dx)
    return added

  def as_differentiated(self) -> "Layers":
    """The same layers, whose branches are traced as `sweep` traces them.

    A rule of differentiation may compute a value by other operations than the
    function itself, and XLA compile even the same ones otherwise.

    Example:
      >>> w = jnp.ones((3, 4))
      >>> add = lambda p, x, *, key, state, aux: (p * x, state)
      >>> stack = Layers.of(add, add, (w, w), None, None).as_differentiated()
      >>> print(stack.f(w[0], 2 * w[0], key=None, state=None, aux=None))
      (Array([2., 2., 2., 2.], dtype=float32), None)
    """
    return self._replace(f=_differentiated(self.f), g=_differentiated(self.g))


def _differentiated(branch):
  """The branch, and how its value is computed where it is differentiated."""

  def call(params, x, /, *, key, state, aux):
    dx, _, state = _pull(branch, params, x, key, state, aux)
    return dx, state

  return call


def _pull(branch, params, x, key, state, aux):
  """(dx, its pullback to floats of (params, x, aux), the new state)."""
  (p_floats, p_ints), (a_floats, a_ints) = separate(params), separate(aux)

  def call(p_floats, x, a_floats):
    params, aux = combine(p_floats, p_ints), combine(a_floats, a_ints)
    return branch(params, x, key=key, state=state, aux=aux)

  return jax.vjp(call, p_floats, x, a_floats, has_aux=True)


def _keys(keys, depth):
  if keys is None:
    return None, None
  if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
    raise TypeError(f"keys are {keys.dtype}; make them by jax.random.key")
  if keys.ndim == 0:
    keys = jax.random.split(keys, (depth, 2))
  if keys.shape != (depth, 2):
    raise ValueError(
      f"keys have the shape {keys.shape}; it is () or {(depth, 2)}"
    )
  return keys[:, 0], keys[:, 1]


def enter(x: Any, grid: int | None) -> Pair:
  """Two arrays as streams: float32 at least, and on the grid.

  Example:
    >>> print(enter((jnp.array([0.3]), jnp.array([0.6])), 2))
    (Array([0.25], dtype=float32), Array([0.5], dtype=float32))
  """
  if grid is not None and not 0 <= grid <= 23:
    raise ValueError(f"grid is {grid}; it is None or in [0, 23]")
  x1, x2 = (jnp.asarray(s) for s in x)
  if x1.shape != x2.shape:
    raise ValueError(f"the streams have the shapes {x1.shape} and {x2.shape}")
  wide = max(accumulator(s.dtype) for s in (x1, x2))
  zero = jnp.zeros((), wide)
  return snap(x1, zero, grid), snap(x2, zero, grid)


def snap(
  dx: Float[Array, "..."], stream: Float[Array, "..."], grid: int | None
) -> Float[Array, "..."]:
  """dx as it is added to a stream: of its dtype, a multiple of 2^-grid.

  Example:
    >>> print(snap(jnp.array([0.3, -1.2], jnp.bfloat16), jnp.zeros(2), 2))
    [ 0.25 -1.25]
  """
  kind = jnp.finfo(dx.dtype)
  dx = dx.astype(stream.dtype)
  if kind.nmant < jnp.finfo(stream.dtype).nmant:
    # XLA may leave out a rounding to bfloat16 and back, here but not there.
    dx = jax.lax.reduce_precision(dx, kind.nexp, kind.nmant)
  if grid is None:
    return dx
  # Exactly the rounded value, with the derivative 1 of any order.
  low = jnp.round(dx * 2.0**grid) * 2.0**-grid
  return jax.lax.stop_gradient(low) + (dx - jax.lax.stop_gradient(dx))


def _step(stack, layer, x, aux, grid):
  """One layer: (y, its new states, what f and g returned)."""
  (pf, kf, sf), (pg, kg, sg) = layer
  x1, x2 = x
  df, sf = stack.f(pf, x2, key=kf, state=sf, aux=aux)
  y1 = x1 + snap(df, x1, grid)
  dg, sg = stack.g(pg, y1, key=kg, state=sg, aux=aux)
  return (y1, x2 + snap(dg, x2, grid)), (sf, sg), (df, dg)


def run(
  stack: Layers, x: Pair, aux: Any, *, grid: int | None, start: int
) -> tuple[Pair, Any, Any]:
  """Runs a stack.

  Args:
    stack, x, aux, grid: see `isthmus.nets.reversible.reversible_stack`.
    start: the first of the layers whose deltas are returned.

  Returns:
    (y, states, deltas): deltas are what f and g of layers `start` to the last
    returned, before it was rounded to the grid, stacked; None if there is no
    such layer.

  Example:
    >>> add = lambda p, x, *, key, state, aux: (p * x, state)
    >>> stack = Layers.of(add, add, (jnp.ones(2), jnp.ones(2)), None, None)
    >>> x = jnp.ones(1), jnp.zeros(1)
    >>> y, _, deltas = run(stack, x, None, grid=12, start=1)
    >>> print(y, deltas)
    (Array([2.], dtype=float32), Array([3.], dtype=float32)) (Array([[1.]], \
dtype=float32), Array([[2.]], dtype=float32))
  """
  if start in (0, stack.depth):
    return _part(stack, x, aux, grid, range(stack.depth), deltas=not start)
  x, first, _ = _part(stack, x, aux, grid, range(start), deltas=False)
  rest = range(start, stack.depth)
  y, last, deltas = _part(stack, x, aux, grid, rest, deltas=True)
  join = lambda a, b: jnp.concatenate([a, b])
  return y, jax.tree.map(join, first, last), deltas


def _part(stack, x, aux, grid, layers, *, deltas):
  # Autodiff of a loop stores what it picks out of arrays by number, but not
  # what a loop over them is given; a part of them would be a copy.
  whole = len(layers) == stack.depth
  numbers = jnp.arange(layers.start, layers.stop)

  def step(x, item):
    layer = item if whole else stack.layer(item)
    y, state, added = _step(stack, layer, x, aux, grid)
    return y, (state, added if deltas else None)

  items = stack.arrays if whole else numbers
  y, (state, added) = jax.lax.scan(step, x, items)
  return y, state, added


def sweep(
  stack: Layers,
  y: Pair,
  dy: Pair,
  aux: Any,
  deltas: Any,
  *,
  grid: int | None,
  start: int,
) -> tuple[Pair, Pair, tuple[Any, Any], Any]:
  """Walks a stack backwards: the backward pass, and the inverse on its way.

  Args:
    stack, aux, grid: those of `run`.
    y: what `run` returned.
    dy: the loss's derivative by y.
    deltas, start: those of `run`.

  Returns:
    (x, dx, gradients by f's and g's params, gradient by aux), where leaves
    that are not floating point have None.

  Example:
    >>> mul = lambda p, x, *, key, state, aux: (p * x, state)
    >>> stack = Layers.of(mul, mul, (jnp.ones(1), jnp.ones(1)), None, None)
    >>> y, dy = (jnp.array(5.0), jnp.array(8.0)), (jnp.ones(()), jnp.ones(()))
    >>> x, dx, _, _ = sweep(stack, y, dy, None, None, grid=12, start=1)
    >>> x[0].item(), x[1].item(), dx[0].item(), dx[1].item()
    (2.0, 3.0, 2.0, 3.0)
  """
  p_floats, _ = separate((stack.arrays[0][0], stack.arrays[1][0]))
  a_floats, _ = separate(aux)
  wide = lambda leaf: leaf.astype(accumulator(leaf.dtype))

  def pull(branch, one, seen, low):
    """(what a branch added, derivatives by params, what it read, and aux).

    low: the loss's derivative by what it added to, in any precision.
    """
    params, key, state = one
    dx, back, _ = _pull(branch, params, seen, key, state, aux)
    return dx, *back(low.astype(dx.dtype))

  def step(carry, i, cached):
    (y1, y2), (d1, d2), low, grads, d_aux = carry
    layer_f, layer_g = stack.layer(i)
    # One evaluation of a branch serves its derivative and the inverse.
    dg, gg, d_seen, ag = pull(stack.g, layer_g, y1, low)
    d1 = d1 + d_seen
    if cached:
      # Else f would begin before g is done, and both would need memory.
      late, gg = _after(gg, i)
      df, dg = jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(
          leaf, late - start, keepdims=False
        ),
        deltas,
      )
    x2 = y2 - snap(dg, y2, grid)
    added, gf, d_seen, af = pull(stack.f, layer_f, x2, d1)
    x1 = y1 - snap(df if cached else added, y1, grid)
    d2 = d2 + d_seen
    put = lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, i, 0)
    grads = jax.tree.map(put, grads, (gf, gg))
    d_aux = jax.tree.map(lambda a, *ds: a + sum(map(wide, ds)), d_aux, af, ag)
    return ((x1, x2), (d1, d2), d2.astype(low.dtype), grads, d_aux), None

  # What the next layer's g wants of d2, made where d2 is: narrow, so that it
  # isn't read twice.
  narrow = stack.check(y, aux, closed=False)[1].dtype
  carry = (
    y,
    dy,
    dy[1].astype(narrow),
    jax.tree.map(jnp.zeros_like, p_floats),
    jax.tree.map(lambda leaf: jnp.zeros_like(wide(leaf)), a_floats),
  )
  for first, end in ((start, stack.depth), (0, start)):
    if first < end:
      carry, _ = jax.lax.scan(
        functools.partial(step, cached=first >= start),
        carry,
        jnp.arange(first, end),
        reverse=True,
      )
  x, dx, _, (gf, gg), d_aux = carry
  back = lambda d, leaf: d.astype(leaf.dtype)
  return x, dx, (gf, gg), jax.tree.map(back, d_aux, a_floats)


def _after(grads, i):
  """(i, grads): i of use only when grads are computed.

  Its smallest leaf stands for all: nothing large has to be kept for it.
  """
  leaves, tree = jax.tree.flatten(grads)
  if leaves:
    n = min(range(len(leaves)), key=lambda n: leaves[n].size)
    i, leaves[n] = jax.lax.optimization_barrier((i, leaves[n]))
  return i, jax.tree.unflatten(tree, leaves)


def separate(tree: Any) -> tuple[Any, Any]:
  """(floats, the rest), each with None where the other has a leaf.

  Example:
    >>> separate({"a": 1.0, "b": 2})
    ({'a': 1.0, 'b': None}, {'a': None, 'b': 2})
  """
  real = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
  floats = jax.tree.map(lambda leaf: leaf if real(leaf) else None, tree)
  rest = jax.tree.map(lambda leaf: None if real(leaf) else leaf, tree)
  return floats, rest


def combine(floats: Any, rest: Any) -> Any:
  """The tree of which `separate` made two.

  Example:
    >>> combine({"a": 1.0, "b": None}, {"a": None, "b": 2})
    {'a': 1.0, 'b': 2}
  """
  pick = lambda a, b: b if a is None else a
  return jax.tree.map(pick, floats, rest, is_leaf=lambda leaf: leaf is None)
