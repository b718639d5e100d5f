"""Reversible stacks: a backward pass that stores no layer's activations.

Two streams pass through `depth` layers, each of two branches,

  y1 = x1 + f(x2),  y2 = x2 + g(y1),

which is undone by `x2 = y2 - g(y1)`, `x1 = y1 - f(x2)`. The backward pass
walks the layers from the last to the first and computes their inputs again
from their outputs, so that what is stored does not grow with the depth.

In floating point `(x + d) - d` is not x. Here it is: the streams are float32
multiples of 2^-grid, what a branch adds is rounded to such a multiple, and
sums of those are exact while `|x| < 2^(24 - grid)`. A branch then reads in the
backward pass, bit for bit, what it read in the forward pass, in whatever
precision it computes. Both passes trace a branch in one way, that of its
derivative; it must also be compiled alike, for which a GPU needs the
`COMPILER_OPTIONS`, see docs/reversible.md.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from isthmus.nets.coupling import (
  Branch,
  Layers,
  Pair,
  combine,
  enter,
  run,
  separate,
  snap,
  sweep,
)

#: What `reversible_stack`'s `mode` may be.
MODES = ("reversible", "remat", "plain")

#: Of `jax.jit`, for gradients through a reversible stack; not read on a CPU. By
#: default XLA tries kernels for each fusion on the GPU and takes the fastest,
#: and those that it takes for the two passes need not sum in one order.
COMPILER_OPTIONS = {"xla_gpu_experimental_enable_fusion_autotuner": False}


class Reversal(NamedTuple):
  """What `assert_reversible` found.

  Attributes:
    error: largest difference of the inputs and those computed backwards.
    mismatches: how many of their elements differ.
    largest: the largest magnitude in the streams, over all layers.
    limit: that below which they are exact, 2^(24 - grid).

  Example:
    >>> Reversal(error=0.0, mismatches=0, largest=7.5, limit=4096.0).limit
    4096.0
  """

  error: float
  mismatches: int
  largest: float
  limit: float


def reversible_stack(
  f: Branch,
  g: Branch,
  params: tuple[Any, Any],
  x: Pair,
  *,
  keys: Key[Array, "..."] | None = None,
  state: tuple[Any, Any] | None = None,
  aux: Any = None,
  mode: str = "reversible",
  grid: int | None = 12,
  cache: float = 0.0,
  policy: Callable[..., Any] | None = None,
) -> tuple[Pair, tuple[Any, Any] | None]:
  """`depth` layers of `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.

  Every mode computes the same values of the same parameters. They differ in
  what the backward pass stores besides parameters, keys and states, and in
  what it computes again:

    plain       whatever autodiff keeps                  nothing
    remat       both streams of every layer              f and g, but their
                                                         last product
    reversible  the last layer's output, and `cache`     f and g

  The streams are float32 (float64 if x is), whatever the branches compute in.
  A branch's rounding to the grid has the derivative 1. Mode "reversible" can
  be differentiated backwards, as often as is liked, but not forwards; the
  other modes can. On a GPU compile it with `COMPILER_OPTIONS`.

  Args:
    f, g: see `Branch`. They are traced, so they must depend on their
      arguments alone: a traced array that they close over is refused. What
      they return in bfloat16 is cached in bfloat16.
    params: of f and of g, every leaf with a leading axis of depth.
    x: the two streams, two arrays of one shape.
    keys: a typed key, which is split, or keys [depth, 2], of f and of g. The
      backward pass uses each again, so that dropout masks are computed again.
    state: of f and of g, every leaf with a leading axis of depth, e.g.
      running statistics. What a forward pass returns is the new state; the
      backward pass reads the old one and returns none. It has no gradient.
    aux: arrays that every layer reads, e.g. conditioning; its gradient is
      the sum of the layers', in float32.
    mode: "reversible", "remat" or "plain".
    grid: the streams are multiples of 2^-grid; None leaves them as they are,
      and the inverse inexact: its error grows with the depth.
    cache: share of the layers, the last ones, whose dx the forward pass
      stores in f's and g's own dtype. Their inverse is exact without g's
      and f's values, so XLA leaves out the product that each ends in:
      as fast as "remat" with half its bytes, if they return bfloat16.
      `choose_cache` finds it from a number of bytes.
    policy: of `jax.checkpoint`, for mode "remat".

  Returns:
    ((y1, y2), state): state is None if none was given.

  Raises:
    ValueError: an unknown mode, a grid outside [0, 23], cache outside [0, 1],
      an option that the mode doesn't read, leaves whose leading axes differ,
      streams or a dx of different shapes, a branch that closes over a traced
      array.
    TypeError: keys that are not typed keys; forward-mode differentiation of
      mode "reversible".

  Example:
    >>> def mlp(p, x, *, key, state, aux):
    ...   return jnp.tanh(x @ p), state
    >>> w = jax.random.normal(jax.random.key(0), (2, 3, 4, 4))
    >>> x = jax.random.normal(jax.random.key(1), (5, 4))
    >>> def loss(w, mode):
    ...   (y1, y2), _ = reversible_stack(mlp, mlp, (w[0], w[1]), (x, x),
    ...                                  mode=mode)
    ...   return (y1 * y2).sum()
    >>> a, b = (jax.grad(loss)(w, m) for m in ("reversible", "plain"))
    >>> bool(jnp.allclose(a, b, rtol=1e-5))
    True

  References:
    Gomez et al., The Reversible Residual Network: Backpropagation Without
    Storing Activations, arXiv 1707.04585.
    Mangalam et al., Reversible Vision Transformers, CVPR 2022.
  """
  if mode not in MODES:
    raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
  if not 0 <= cache <= 1:
    raise ValueError(f"cache is {cache}; it is a share in [0, 1]")
  if cache and mode != "reversible":
    raise ValueError(f"cache is {cache}; mode {mode!r} has nothing to cache")
  if policy is not None and mode != "remat":
    raise ValueError(f"a policy is for mode 'remat'; mode is {mode!r}")
  stack = Layers.of(f, g, params, keys, state)
  x = enter(x, grid)
  stack.check(x, aux, closed=mode == "reversible")
  if mode == "reversible":
    y, new = _reverse(stack, x, aux, grid, stack.depth - _cached(stack, cache))
  else:
    if mode == "remat":
      keep = functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
      stack = stack._replace(f=keep(stack.f), g=keep(stack.g))
    y, new, _ = run(stack, x, aux, grid=grid, start=stack.depth)
  return y, None if state is None else jax.lax.stop_gradient(new)


def reversible_inverse(
  f: Branch,
  g: Branch,
  params: tuple[Any, Any],
  y: Pair,
  *,
  keys: Key[Array, "..."] | None = None,
  state: tuple[Any, Any] | None = None,
  aux: Any = None,
  grid: int | None = 12,
) -> Pair:
  """The x of which `reversible_stack` makes y; see there.

  Exact where y was made without being differentiated: a gradient's passes
  both compute a branch as its derivative's rule does.

  Args:
    f, g, params, keys, aux, grid: those of the forward pass.
    y: the two streams, as they came out.
    state: that which the forward pass was given, not what it returned.

  Returns:
    The two streams before the first layer, on the grid.

  Raises:
    ValueError, TypeError: see `reversible_stack`.

  Example:
    >>> def mlp(p, x, *, key, state, aux):
    ...   return jnp.tanh(x @ p).astype(jnp.bfloat16), state
    >>> w = jax.random.normal(jax.random.key(0), (2, 9, 4, 4))
    >>> x = (jnp.ones((2, 4)), jnp.zeros((2, 4)))
    >>> y, _ = reversible_stack(mlp, mlp, (w[0], w[1]), x)
    >>> back = reversible_inverse(mlp, mlp, (w[0], w[1]), y)
    >>> bool((back[0] == x[0]).all() and (back[1] == x[1]).all())
    True
  """
  stack = Layers.of(f, g, params, keys, state)
  y = enter(y, grid)
  stack.check(y, aux, closed=False)

  def step(y, i):
    (pf, kf, sf), (pg, kg, sg) = stack.layer(i)
    y1, y2 = y
    x2 = y2 - snap(g(pg, y1, key=kg, state=sg, aux=aux)[0], y2, grid)
    x1 = y1 - snap(f(pf, x2, key=kf, state=sf, aux=aux)[0], y1, grid)
    return (x1, x2), None

  return jax.lax.scan(step, y, jnp.arange(stack.depth), reverse=True)[0]


def assert_reversible(
  f: Branch,
  g: Branch,
  params: tuple[Any, Any],
  x: Pair,
  *,
  keys: Key[Array, "..."] | None = None,
  state: tuple[Any, Any] | None = None,
  aux: Any = None,
  grid: int | None = 12,
  cache: float = 0.0,
  atol: float = 0.0,
) -> Reversal:
  """Runs a stack forwards and backwards, and compares its inputs.

  The backward pass is that which a gradient runs, compiled with its gradients
  and `COMPILER_OPTIONS`, not the inverse alone: XLA may round a branch
  otherwise there.

  Args:
    f, g, params, x, keys, state, aux, grid, cache: see `reversible_stack`.
    atol: the largest difference that is let pass.

  Returns:
    What was found.

  Raises:
    AssertionError: inputs that differ by more, or streams beyond the limit.
    ValueError, TypeError: see `reversible_stack`.

  Example:
    >>> def mlp(p, x, *, key, state, aux):
    ...   return jnp.tanh(x @ p), state
    >>> w = jax.random.normal(jax.random.key(0), (2, 9, 4, 4))
    >>> x = jax.random.normal(jax.random.key(1), (5, 4))
    >>> assert_reversible(mlp, mlp, (w[0], w[1]), (x, x)).mismatches
    0
  """
  stack = Layers.of(f, g, params, keys, state)
  x = enter(x, grid)
  stack.check(x, aux, closed=False)
  start = stack.depth - _cached(stack, cache)

  @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
  def walk(arrays, x, aux):
    whole = stack._replace(arrays=arrays)
    there = whole.as_differentiated()
    y, _, deltas = run(there, x, aux, grid=grid, start=start)

    def follow(x, i):
      layer = jax.tree.map(lambda leaf: leaf[None], whole.layer(i))
      one = there._replace(arrays=layer, depth=1)
      y, _, _ = run(one, x, aux, grid=grid, start=1)
      return y, jnp.maximum(*(jnp.abs(s).max() for s in y))

    sizes = jax.lax.scan(follow, x, jnp.arange(whole.depth))[1]
    ones = jax.tree.map(jnp.ones_like, y)
    back, *grads = sweep(whole, y, ones, aux, deltas, grid=grid, start=start)
    apart = [jnp.abs(a - b) for a, b in zip(back, x, strict=True)]
    # The gradients go out too: without them XLA would drop their products.
    return (
      jnp.maximum(*(d.max() for d in apart)),
      sum((d != 0).sum() for d in apart),
      jnp.maximum(sizes.max(), jnp.maximum(*(jnp.abs(s).max() for s in x))),
    ), grads

  (error, count, largest), _ = walk(stack.arrays, x, aux)
  limit = math.inf if grid is None else 2.0 ** (_digits(x) - grid)
  found = Reversal(float(error), int(count), float(largest), limit)
  if not found.largest < limit:
    raise AssertionError(
      f"the streams reach {found.largest:.4g}, and multiples of 2^-{grid} are"
      f" exact below {limit:g}: take a smaller grid, or a norm in the branches"
    )
  if not found.error <= atol:
    raise AssertionError(
      f"{found.mismatches} of {2 * x[0].size} inputs differ, by"
      f" {found.error:.3g} at most; {atol:g} is let pass"
    )
  return found


def choose_cache(
  budget: float, f: Branch, g: Branch, params: tuple[Any, Any], x: Pair, **rest
) -> float:
  """The largest `cache` of `reversible_stack` that takes `budget` bytes.

  Args:
    budget: bytes, of all devices together.
    f, g, params, x: see `reversible_stack`.
    **rest: its keys, state and aux.

  Returns:
    A share of the layers, in [0, 1].

  Example:
    >>> def mlp(p, x, *, key, state, aux):
    ...   return jnp.tanh(x @ p).astype(jnp.bfloat16), state
    >>> w, x = jnp.ones((8, 4, 4)), jnp.ones((16, 4))
    >>> choose_cache(1024, mlp, mlp, (w, w), (x, x))  # 256 bytes a layer
    0.5
  """
  if budget < 0:
    raise ValueError(f"budget is {budget} bytes; it is at least 0")
  aux = rest.pop("aux", None)
  stack = Layers.of(
    f, g, params, rest.pop("keys", None), rest.pop("state", None)
  )
  if rest:
    raise TypeError(f"{', '.join(rest)}: no input of choose_cache")
  deltas = stack.check(enter(x, None), aux, closed=False)
  size = sum(d.size * d.dtype.itemsize for d in deltas)
  return min(stack.depth, int(budget // size)) / stack.depth


def _cached(stack, cache):
  """How many layers."""
  return round(cache * stack.depth)


def _digits(x) -> int:
  return jnp.finfo(x[0].dtype).nmant + 1


def _reverse(stack, x, aux, grid, start):
  """The stack with a backward pass of its own.

  One rule around the whole loop: a rule around each layer would have the loop
  store every layer's output.
  """
  floats, ints = separate((stack.arrays[0][0], stack.arrays[1][0], aux))

  def whole(floats, rest):
    ints, keys, state = rest
    pf, pg, aux = combine(floats, ints)
    arrays = (pf, keys[0], state[0]), (pg, keys[1], state[1])
    return stack._replace(arrays=arrays), aux

  @jax.custom_vjp
  def stack_vjp(floats, x, rest):
    stack, aux = whole(floats, rest)
    y, state, _ = run(stack, x, aux, grid=grid, start=stack.depth)
    return y, state

  def forward(floats, x, rest):
    stack, aux = whole(floats, rest)
    stack = stack.as_differentiated()
    y, state, deltas = run(stack, x, aux, grid=grid, start=start)
    return (y, state), (floats, rest, y, deltas)

  def backward(kept, given):
    floats, rest, y, deltas = kept
    stack, aux = whole(floats, rest)
    _, dx, d_params, d_aux = sweep(
      stack, y, given[0], aux, deltas, grid=grid, start=start
    )
    return (*d_params, d_aux), dx, None

  stack_vjp.defvjp(forward, backward)
  (_, kf, sf), (_, kg, sg) = stack.arrays
  try:
    return stack_vjp(floats, x, (ints, (kf, kg), (sf, sg)))
  except TypeError as error:
    if "forward-mode" not in str(error):
      raise
    raise TypeError(
      "mode 'reversible' is differentiated backwards only; mode 'plain' or"
      " 'remat' computes the same and is differentiated forwards (jvp) too"
    ) from error
