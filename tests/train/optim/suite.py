"""The suite of every optimiser: an optax transformation the loop can rely on.

An optimiser is one `Entry` in `test_optimisers.py`; each function here takes
an entry and raises AssertionError with the entry's name and what doesn't hold.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from isthmus.train.ckpt import Checkpointer
from isthmus.train.mesh import Mesh, P, path_name, shardings

STEPS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """An optimiser under test.

  Attributes:
    name: of the entry.
    build: `build(steps)` makes the transformation, without weight decay, with
      whatever schedule brings it to rest after that many steps.
    inject: `inject(learning_rate)` makes it too, for
      `optax.inject_hyperparams`; None where the rate can't be an array.
    level: share of the first loss that 200 steps must come below.
    narrow: the same for bfloat16 parameters; None where they are refused.
    rounding: relative difference that another order of sums may make.
    extra: regex on the paths of those leaves of the state that are neither
      scalars nor shaped like the parameter their path ends with.
  """

  name: str
  build: Callable[[int], optax.GradientTransformation]
  inject: Callable[..., optax.GradientTransformation] | None = None
  level: float = 1e-3
  narrow: float | None = 2e-2
  rounding: float = 1e-5
  extra: str | None = None


def start(dtype: Any = jnp.float32) -> Any:
  """Parameters: a matrix, a matrix in a stack, vectors; zeros."""
  shapes = {
    "dense": {"kernel": (4, 6), "bias": (6,)},
    "blocks": {"kernel": (2, 4, 4)},
    "scale": (3,),
  }
  return jax.tree.map(
    lambda s: jnp.zeros(s, dtype), shapes, is_leaf=lambda x: type(x) is tuple
  )


def parabola(params: Any) -> jax.Array:
  """`sum (p - target)^2`."""
  rng = np.random.default_rng(0)
  return sum(
    jnp.sum(jnp.square(p.astype(jnp.float32) - rng.normal(size=p.shape)))
    for p in jax.tree.leaves(params)
  )


def rosenbrock(params: Any) -> jax.Array:
  """`sum (1 - x_i)^2 + (x_{i+1} - x_i^2)^2` over neighbours of each leaf."""
  total = jnp.zeros(())
  for p in jax.tree.leaves(params):
    x = p.astype(jnp.float32).reshape(-1)
    total += jnp.sum(jnp.square(1 - x))
    total += jnp.sum(jnp.square(x[1:] - jnp.square(x[:-1])))
  return total


@functools.cache
def first_gradients() -> Any:
  """Of the parabola, at the start."""
  return jax.jit(jax.grad(parabola))(start())


@functools.cache
def stepper(tx: optax.GradientTransformation, loss: Callable[..., Any]) -> Any:
  """`(params, state) -> (params, state)`, jitted."""

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  return step


@functools.cache
def transformation(entry: Entry) -> optax.GradientTransformation:
  return entry.build(STEPS)


def run(tx: Any, params: Any, state: Any, steps: int, loss: Any = parabola):
  for _ in range(steps):
    params, state = stepper(tx, loss)(params, state)
  return params, state


def assert_it_descends(entry: Entry) -> None:
  """Parabola and Rosenbrock's valley, in float32 and bfloat16."""
  tx, losses = transformation(entry), (parabola, rosenbrock)

  def both(params):
    return sum(f(p) for f, p in zip(losses, params, strict=True))

  @jax.jit
  def descend(params):
    def body(_, carry):
      return stepper(tx, both)(*carry)

    params, _ = jax.lax.fori_loop(0, STEPS, body, (params, tx.init(params)))
    return params, [f(p) for f, p in zip(losses, params, strict=True)]

  for dtype in (jnp.float32, jnp.bfloat16):
    level = entry.level if dtype == jnp.float32 else entry.narrow
    if level is None:
      continue
    params, reached = descend((start(dtype), start(dtype)))
    assert all(p.dtype == dtype for p in jax.tree.leaves(params)), (
      f"{entry.name}: parameters of {jnp.dtype(dtype)} change their dtype"
    )
    for loss, last in zip(losses, reached, strict=True):
      first = loss(start())
      assert last < level * first, (
        f"{entry.name}: {loss.__name__} in {jnp.dtype(dtype)} went from "
        f"{first:.3g} to {last:.3g}, not below {level:g} of it"
      )


def assert_state_is_like_the_parameters(entry: Entry) -> None:
  """So a sharding rule that finds a parameter finds what belongs to it.

  And an update keeps the shapes and dtypes that there were at the start.
  """
  tx, params = transformation(entry), start()
  shapes = {path_name(p): x.shape for p, x in jax.tree.leaves_with_path(params)}
  state = jax.eval_shape(tx.init, params)
  _, after = jax.eval_shape(tx.update, params, state, params)
  kinds = [
    {
      path_name(p): f"{x.dtype}{list(x.shape)}"
      for p, x in jax.tree.leaves_with_path(s)
    }
    for s in (state, after)
  ]
  for name in kinds[0] | kinds[1]:
    old, new = (k.get(name, "nothing") for k in kinds)
    assert old == new, f"{entry.name}: an update makes {name} {new}, from {old}"
  for path, leaf in jax.tree.leaves_with_path(state):
    name = path_name(path)
    if not leaf.shape or (entry.extra and re.search(entry.extra, name)):
      continue
    owner = [p for p in shapes if name.endswith("/" + p)]
    assert owner and leaf.shape == shapes[owner[0]], (
      f"{entry.name}: state {name} {leaf.shape} is no parameter's; say so in "
      "the entry's extra"
    )


def assert_jit_changes_nothing(entry: Entry) -> None:
  tx, params = transformation(entry), start()
  gradients = first_gradients()
  plain, _ = tx.update(gradients, tx.init(params), params)
  jitted, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
  _close(entry, "without jit", plain, jitted, entry.rounding)


def assert_it_chains(entry: Entry) -> None:
  """After a transformation that halves the gradient, and before another."""
  tx, params = transformation(entry), start()
  gradients = first_gradients()
  half = jax.tree.map(lambda g: g / 2, gradients)
  alone, _ = tx.update(half, tx.init(params), params)
  chain = optax.chain(optax.scale(0.5), tx, optax.scale(3.0))
  got, _ = chain.update(gradients, chain.init(params), params)
  _close(entry, "in a chain", got, jax.tree.map(lambda u: 3 * u, alone), 1e-6)


def assert_hyperparameters_can_be_injected(entry: Entry) -> None:
  """A learning rate held in the state can be changed between steps."""
  if entry.inject is None:
    return
  make = optax.inject_hyperparams(entry.inject)
  tx, params = make(learning_rate=0.1), start()
  state, gradients = tx.init(params), first_gradients()
  update = jax.jit(tx.update)
  one, _ = update(gradients, state, params)
  state.hyperparams["learning_rate"] = jnp.asarray(0.2)
  two, _ = update(gradients, state, params)
  doubled = jax.tree.map(lambda u: 2 * u, one)
  _close(entry, "at twice the learning rate", two, doubled, 1e-6)


def assert_a_zero_gradient_is_harmless(entry: Entry) -> None:
  """At the first step: nothing moves, and the next step is finite."""
  tx, params = transformation(entry), start()
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, state = jax.jit(tx.update)(zeros, tx.init(params), params)
  assert all((u == 0).all() for u in jax.tree.leaves(updates)), (
    f"{entry.name}: a gradient of 0 moves parameters"
  )
  moved, _ = run(tx, params, state, 5)
  assert _finite(moved), f"{entry.name}: not finite after a gradient of 0"
  assert parabola(moved) < parabola(params), f"{entry.name}: stuck after 0"


def assert_nan_is_skipped_by_apply_if_finite(entry: Entry) -> None:
  """The step of a NaN gradient leaves no trace, in the state neither."""
  tx = optax.apply_if_finite(transformation(entry), max_consecutive_errors=3)
  params = start()
  step = stepper(tx, parabola)
  bad = jax.tree.map(lambda p: p + jnp.nan, params)
  once = step(params, tx.init(params))
  updates, after = jax.jit(tx.update)(bad, once[1], once[0])
  assert all((u == 0).all() for u in jax.tree.leaves(updates)), entry.name
  assert int(after.total_notfinite) == 1, entry.name
  got, want = step(once[0], after), step(*once)
  _equal(entry, "after a skipped step", got[0], want[0])


def assert_micro_steps_average(entry: Entry) -> None:
  """`optax.MultiSteps` of two is one step of the mean gradient."""
  tx, params = transformation(entry), start()
  gradients = first_gradients()
  parts = [jax.tree.map(lambda g, s=s: s * g, gradients) for s in (0.5, 1.5)]
  many = optax.MultiSteps(tx, every_k_schedule=2)
  update, state = jax.jit(many.update), many.init(params)
  first, state = update(parts[0], state, params)
  second, _ = update(parts[1], state, params)
  assert all((u == 0).all() for u in jax.tree.leaves(first)), entry.name
  want, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
  _close(entry, "in MultiSteps", second, want, entry.rounding)


def assert_containers_change_nothing(entry: Entry) -> None:
  """The same parameters in a dict, a list and a tuple."""
  tx, params = transformation(entry), start()
  names = sorted(params)
  gradients = first_gradients()
  want, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
  for kind in (list, tuple):
    p, g, w = (kind(t[n] for n in names) for t in (params, gradients, want))
    got, _ = jax.jit(tx.update)(g, tx.init(p), p)
    _equal(entry, f"in a {kind.__name__}", got, w)


def assert_it_resumes(entry: Entry, folder: Any) -> None:
  """Six steps are three, a checkpoint, and three more, to the bit."""
  tx, params = transformation(entry), start()
  whole = run(tx, params, tx.init(params), 6)
  half = run(tx, params, tx.init(params), 3)
  with Checkpointer(folder) as checkpoints:
    checkpoints.save(3, half, wait=True)
    target = jax.tree.map(jnp.zeros_like, half)
    step, restored = checkpoints.restore(target)
  assert step == 3
  _equal(entry, "restored", restored, half)
  _equal(entry, "resumed", run(tx, *restored, 3), whole)


def assert_devices_change_nothing(entry: Entry) -> None:
  """Kernels and what belongs to them split over eight devices."""
  tx, params = transformation(entry), start()
  whole = run(tx, params, tx.init(params), 3)
  mesh = Mesh(data=-1, fsdp=2).build()
  rules = ((r"kernel$", P("fsdp", None)),)
  both = params, tx.init(params)
  both = jax.device_put(both, shardings(both, rules, mesh))
  with jax.set_mesh(mesh):
    got = run(tx, *both, 3)
  assert not got[0]["dense"]["kernel"].sharding.is_fully_replicated, entry.name
  _close(entry, f"on {mesh.size} devices", got[0], whole[0], entry.rounding)


CHECKS = (
  assert_it_descends,
  assert_state_is_like_the_parameters,
  assert_jit_changes_nothing,
  assert_it_chains,
  assert_hyperparameters_can_be_injected,
  assert_a_zero_gradient_is_harmless,
  assert_nan_is_skipped_by_apply_if_finite,
  assert_micro_steps_average,
  assert_containers_change_nothing,
  assert_devices_change_nothing,
)


def _finite(tree: Any) -> bool:
  return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def _close(entry: Entry, what: str, got: Any, want: Any, bound: float) -> None:
  for (path, a), b in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
    assert error <= bound, (
      f"{entry.name}: {what}: {path_name(path)} is off by {error:.2g}"
    )


def _equal(entry: Entry, what: str, got: Any, want: Any) -> None:
  for (path, a), b in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    assert np.array_equal(a, b), (
      f"{entry.name}: {what}: {path_name(path)} differs"
    )
