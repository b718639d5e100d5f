"""Sampling along a flow: from noise at time 1 to data at time 0."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

#: `(x, t) -> v`, or with a state `(x, t, state, dense) -> (v, state)`.
Velocity = Callable[..., Any]
#: What `sample_flow`'s `solver` may be.
SOLVERS = ("euler", "heun")


def shift_time(
  t: Float[Array, "..."] | Float[np.ndarray, "..."] | float, factor: float
) -> Any:
  """`r t / (1 + (r - 1) t)`: times moved towards noise by a factor r above 1.

  0 and 1 stay, shifts by a and b make one by a b, and the logarithm of the
  signal-to-noise ratio `((1 - t) / t)^2` falls by `2 ln r`.

  Args:
    t: times in [0, 1].
    factor: r; for more tokens than a model was made for, usually the root of
      their ratio.

  Raises:
    ValueError: a factor not above 0.

  Example:
    >>> shift_time(0.5, 3.0)
    0.75
  """
  if not factor > 0:
    raise ValueError(f"the factor is {factor}; it must be above 0")
  return factor * t / (1 + (factor - 1) * t)


def flow_times(
  steps: int, *, shift: float = 1.0
) -> Float[np.ndarray, "{steps}+1"]:
  """`steps + 1` times from 1 to 0, evenly spaced and then shifted.

  Raises:
    ValueError: no steps.

  Example:
    >>> flow_times(4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
  """
  if steps < 1:
    raise ValueError(f"steps is {steps}; it is at least 1")
  even = np.linspace(1.0, 0.0, steps + 1)
  return np.asarray(shift_time(even, shift), np.float32)


def sample_flow(
  velocity: Velocity,
  x: Float[Array, "b ..."],
  *,
  steps: int,
  shift: float = 1.0,
  solver: str = "euler",
  state: Any = None,
  dense: Bool[Array, "{steps}"] | Bool[np.ndarray, "{steps}"] | None = None,
) -> Any:
  """Follows `dx/dt = v(x, t)` from t = 1 to 0, in one scan.

  Euler's step from t to s is `x + (s - t) v(x, t)`; Heun's takes the mean of
  the velocities at both of its ends, with twice the evaluations.

  Args:
    velocity: `(x, t) -> v`, with t [b]. If a state is given,
      `(x, t, state, dense) -> (v, state)`, such as `flow_velocity` makes.
    x: noise.
    steps: of the solver.
    shift: of the times, see `flow_times`.
    solver: "euler" or "heun".
    state: what goes along from evaluation to evaluation.
    dense: a flag for each step, handed on to `velocity`, such as those of
      `isthmus.attention.reshape.dense_steps`.

  Returns:
    x at time 0; with a state (x, the last state).

  Raises:
    ValueError: no steps, an unknown solver, a state without flags or flags
      without a state, a state under Heun, which evaluates out of turn.

  Example:
    >>> to_one = lambda x, t: (x - 1.0) / t[:, None]  # all data is 1
    >>> sample_flow(to_one, jnp.array([[3.0, -2.0]]), steps=4).tolist()
    [[1.0, 1.0]]
  """
  if solver not in SOLVERS:
    raise ValueError(f"solver {solver!r} is none of {', '.join(SOLVERS)}")
  if (state is None) != (dense is None):
    raise ValueError("state and dense are given together, or neither is")
  if state is not None and solver != "euler":
    raise ValueError(
      f"solver {solver!r} evaluates twice a step; a state goes along euler's"
    )
  times = jnp.asarray(flow_times(steps, shift=shift))
  flags = None if dense is None else jnp.asarray(dense)

  def at(x, t, *given):
    return velocity(x, jnp.full((len(x),), t), *given)

  def step(carry, now):
    x, state = carry
    t, s, flag = now
    if state is None:
      v = at(x, t)
    else:
      v, state = at(x, t, state, flag)
    if solver == "heun":
      v = (v + at(x + (s - t) * v, s)) / 2
    return ((x + (s - t) * v).astype(x.dtype), state), None

  along = (times[:-1], times[1:], flags)
  (x, state), _ = jax.lax.scan(step, (x, state), along)
  return x if state is None else (x, state)


def flow_velocity(
  model: nn.Module,
  params: Any,
  *,
  label: Int[Array, "b"] | None = None,
  guidance: float = 1.0,
  interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
  """A model's velocity as `sample_flow` calls it, guided by its classes.

  With guidance w the velocity is `u + w (c - u)`, c being that of the labels
  and u that without any. Both are one call, of rows with labels and then the
  same rows without: a state for it has twice the rows of x.

  Args:
    model: a `DiT`, or what is called like one and has `classes`.
    params: its parameters (without the outer `params`).
    label: classes of the rows.
    guidance: w; 1 is none, and costs one evaluation.
    interval: times, both included, outside of which w is 1.

  Raises:
    ValueError: guidance without labels.

  Example:
    >>> from isthmus.nets.dit import DiT
    >>> model = DiT(size=4, patch=2, width=8, depth=1, num_heads=2)
    >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    >>> params = model.init(jax.random.key(1), x, jnp.ones(2))["params"]
    >>> velocity = flow_velocity(model, params)
    >>> bool((sample_flow(velocity, x, steps=2) == x).all())  # untrained
    True

  Reference: guidance, https://arxiv.org/abs/2207.12598; its interval,
    https://arxiv.org/abs/2404.07724.
  """
  if guidance != 1.0 and label is None:
    raise ValueError(f"guidance is {guidance}, and there are no labels")

  def call(x, t, label, state, dense):
    given = {} if state is None else {"state": state, "dense": dense}
    v, aux = model.apply({"params": params}, x, t, label, **given)
    return v, aux.get("state")

  def velocity(x, t, state=None, dense=None):
    if guidance == 1.0:
      v, later = call(x, t, label, state, dense)
      return v if state is None else (v, later)
    assert label is not None
    twice = lambda a, b: jnp.concatenate([a, b])
    none = jnp.full_like(label, model.classes)
    v, later = call(twice(x, x), twice(t, t), twice(label, none), state, dense)
    c, u = jnp.split(v, 2)
    low, high = interval
    w = jnp.where((low <= t) & (t <= high), guidance, 1.0)
    v = u + w.reshape(-1, *(1,) * (x.ndim - 1)) * (c - u)
    return v if state is None else (v, later)

  return velocity
