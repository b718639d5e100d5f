"""The suite of every task: what the loop relies on.

A task is one `Entry` in `test_tasks.py`; each function here takes an entry
and raises AssertionError with the entry's name and what doesn't hold.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from isthmus.train.state import TrainState, make_step
from isthmus.train.tasks.task import Task

ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A task under test, and what it needs.

  Attributes:
    name: of the entry.
    task: the task.
    model: `model(dropout=rate, statistics=flag)` makes a small model; with
      statistics it has a collection besides `params` that training changes.
    batch: `batch(rows)` makes a batch as the loader does, without `valid`;
      the same one each time, rows of different weight where there are such.
    draws: the loss draws random numbers besides dropout, so that micro-batches
      see others; the entry beside it, without them, shows the weights.
    learns: after 30 steps on a batch the loss is below this share of the first.
  """

  name: str
  task: Task
  model: Callable[..., nn.Module]
  batch: Callable[[int], dict[str, np.ndarray]]
  draws: bool = False
  learns: float = 0.7


KEY = jax.random.key(1)


@functools.cache
def setting(entry: Entry, **kwargs) -> tuple[nn.Module, Any, Any, Any]:
  """(model, params, mutables, batch)."""
  model, batch = entry.model(**kwargs), entry.batch(ROWS)
  init = functools.partial(entry.task.init, model)
  variables = dict(jax.jit(init)(batch, jax.random.key(0)))
  return model, variables.pop("params"), variables, batch


@functools.cache
def gradient(entry: Entry, **kwargs) -> Callable[..., Any]:
  """`(params, mutables, batch, key) -> ((loss, aux), gradients)`, jitted."""
  model = setting(entry, **kwargs)[0]

  def loss(params, mutables, batch, key):
    return entry.task.loss(model, params, mutables, batch, key)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_the_protocol_is_kept(entry: Entry) -> None:
  """A scalar float32 loss, scalar float32 metrics, a weight; all finite."""
  _, params, mutables, batch = setting(entry)
  assert isinstance(entry.task, Task), f"{entry.name} lacks a method of Task"
  (loss, aux), gradients = gradient(entry)(params, mutables, batch, KEY)
  numbers = {"loss": loss, "weight": aux.weight, **aux.metrics}
  for name, x in numbers.items():
    assert x.shape == () and x.dtype == jnp.float32, (
      f"{entry.name}: {name} is {x.dtype} {x.shape}, not a float32 scalar"
    )
    assert np.isfinite(x), f"{entry.name}: {name} is {x}"
  assert aux.weight > 0, f"{entry.name}: weight is {aux.weight}"
  leaves = jax.tree.leaves(gradients)
  assert all(np.isfinite(g).all() for g in leaves), (
    f"{entry.name}: a gradient is not finite"
  )
  assert any(np.abs(g).max() > 0 for g in leaves), (
    f"{entry.name}: all gradients are 0"
  )


def assert_parts_combine_by_weight(entry: Entry) -> None:
  """`sum w_i x_i / sum w_i` over unequal parts is the whole batch's x.

  x: the loss, the metrics, and the gradient.
  """
  if entry.draws:
    return
  _, params, mutables, batch = setting(entry)
  run = gradient(entry)

  def take(rows):
    (loss, aux), g = run(params, mutables, _rows(batch, rows), KEY)
    return float(aux.weight), {"loss": loss, "g": g, **aux.metrics}

  whole, wanted = take(slice(None))
  parts = [take(slice(3)), take(slice(3, None))]
  total = sum(w for w, _ in parts)
  assert math.isclose(total, whole, rel_tol=1e-6), (
    f"{entry.name}: the parts weigh {total}, the whole batch {whole}"
  )
  got = jax.tree.map(
    lambda a, b: (parts[0][0] * a + parts[1][0] * b) / total,
    *(x for _, x in parts),
  )
  _close(entry, "the parts' weighted mean", got, wanted, 1e-5)


def assert_micro_batches_change_nothing(entry: Entry) -> None:
  """A step of four micro-batches is the step of one."""
  if entry.draws:
    return
  model, params, mutables, batch = setting(entry)
  tx = optax.sgd(1.0)
  state = _state(params, tx, mutables)
  results = [
    jax.jit(make_step(model, entry.task, tx, accumulate=parts))(state, batch)
    for parts in (1, 4)
  ]
  (one, metrics), (four, others) = results
  moved = jax.tree.map(lambda p, q: np.abs(p - q).max(), one.params, params)
  assert max(jax.tree.leaves(moved)) > 0, f"{entry.name}: no step was made"
  _close(entry, "accumulate=4", four.params, one.params, 1e-5)
  _close(entry, "accumulate=4", others, metrics, 1e-4)


def assert_padding_changes_nothing(entry: Entry) -> None:
  """Rows of `valid` 0 add nothing to the sums of an evaluation."""
  evaluate, batch = _evaluation(entry)
  more = {k: np.concatenate([x, x[:2][::-1]]) for k, x in batch.items()}
  more["valid"][-2:] = 0
  _close(entry, "with padding", evaluate(more), evaluate(batch), 1e-6)


def assert_sums_add_up(entry: Entry) -> None:
  """An evaluation's sums are those of its parts, added; each makes a figure."""
  evaluate, batch = _evaluation(entry)
  whole = evaluate(batch)
  parts = [evaluate(_rows(batch, s)) for s in (slice(3), slice(3, None))]
  added = jax.tree.map(lambda a, b: a + b, *parts)
  _close(entry, "sums of parts", added, whole, 1e-5)
  figures = [
    entry.task.summarize({k: float(v) for k, v in sums.items()})
    for sums in (whole, parts[0])
  ]
  assert "loss" in figures[0], f"{entry.name}: no loss in {figures[0]}"
  for name, value in figures[0].items():
    assert math.isfinite(value), f"{entry.name}: {name} is {value}"
  assert figures[0] != figures[1], f"{entry.name}: rows make no difference"


def assert_a_batch_is_learned(entry: Entry) -> None:
  """30 steps of Adam on one batch bring the loss down."""
  model, params, mutables, batch = setting(entry)
  tx = optax.adam(1e-2)
  step = jax.jit(make_step(model, entry.task, tx))
  state, losses = _state(params, tx, mutables), []
  for _ in range(30):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < entry.learns * losses[0], (
    f"{entry.name}: the loss went from {losses[0]:.3g} to {losses[-1]:.3g}"
  )


def assert_jit_changes_nothing(entry: Entry) -> None:
  model, params, mutables, batch = setting(entry)
  loss, aux = entry.task.loss(
    model, params, mutables, jax.tree.map(jnp.asarray, batch), KEY
  )
  (jitted, other), _ = gradient(entry)(params, mutables, batch, KEY)
  got = {"loss": loss, **aux.metrics}
  _close(entry, "without jit", got, {"loss": jitted, **other.metrics}, 1e-5)


def assert_the_key_decides(entry: Entry) -> None:
  """Equal by key; another key makes other dropout, in training alone."""
  _, params, mutables, batch = setting(entry)
  two = jax.random.key(2)

  def losses(*keys, **kwargs):
    run = gradient(entry, **kwargs)
    return [run(params, mutables, batch, key)[0][0] for key in keys]

  one, same, other = losses(KEY, KEY, two, dropout=0.5)
  assert one == same, f"{entry.name}: one key, two losses"
  assert one != other, f"{entry.name}: another key, the same loss"
  one, other = losses(KEY, two)
  assert (one != other) == entry.draws, f"{entry.name}: draws is {entry.draws}"
  evaluate, batch = _evaluation(entry, dropout=0.5)
  _close(entry, "evaluated twice", evaluate(batch), evaluate(batch), 0)


def assert_mutables_come_back(entry: Entry) -> None:
  """Collections besides `params` change in training and keep their tree."""
  _, params, mutables, batch = setting(entry, statistics=True)
  assert mutables, f"{entry.name}: the model has no statistics"
  run = gradient(entry, statistics=True)
  (_, aux), _ = run(params, mutables, batch, KEY)
  kinds = [
    jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    for tree in (mutables, aux.mutables)
  ]
  assert kinds[0] == kinds[1], (
    f"{entry.name}: mutables {kinds[0]} come back as {kinds[1]}"
  )
  changed = jax.tree.map(
    lambda a, b: bool((a != b).any()), mutables, aux.mutables
  )
  assert any(jax.tree.leaves(changed)), f"{entry.name}: mutables don't change"


def assert_throughput_counts_units(entry: Entry) -> None:
  """Twice the rows are twice the units and the FLOPs."""
  model = entry.model()
  counts = []
  for rows in (ROWS, 2 * ROWS):
    shapes = {k: x.shape for k, x in entry.batch(rows).items()}
    unit, units, flops = entry.task.throughput(model, shapes)
    assert unit and isinstance(unit, str), f"{entry.name}: unit {unit!r}"
    assert units > 0 and (math.isnan(flops) or flops > 0), entry.name
    counts.append((units, flops))
  (a, b), (c, d) = counts
  assert c == 2 * a and (math.isnan(b) or d == 2 * b), (
    f"{entry.name}: {counts[0]} of {ROWS} rows, {counts[1]} of twice as many"
  )


CHECKS = (
  assert_the_protocol_is_kept,
  assert_parts_combine_by_weight,
  assert_micro_batches_change_nothing,
  assert_padding_changes_nothing,
  assert_sums_add_up,
  assert_a_batch_is_learned,
  assert_jit_changes_nothing,
  assert_the_key_decides,
  assert_mutables_come_back,
  assert_throughput_counts_units,
)


def _rows(batch: dict[str, np.ndarray], rows: slice) -> dict[str, np.ndarray]:
  return {name: x[rows] for name, x in batch.items()}


def _state(params: Any, tx: Any, mutables: Any) -> TrainState:
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    mutables=mutables,
    key=KEY,
  )


def _evaluation(entry: Entry, **kwargs) -> tuple[Any, dict[str, np.ndarray]]:
  """(batch -> sums, a batch with `valid`)."""
  model, params, mutables, batch = setting(entry, **kwargs)

  @jax.jit
  def evaluate(batch):
    return entry.task.evaluate(model, params, mutables, batch)

  return evaluate, {**batch, "valid": np.ones(ROWS, np.float32)}


def _close(entry: Entry, what: str, got: Any, want: Any, bound: float) -> None:
  for (path, a), b in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    name = jax.tree_util.keystr(path)
    error = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()
    size = max(1.0, np.abs(b).max())
    assert error <= bound * size, (
      f"{entry.name}: {what}: {name} is off by {error:.2g}"
    )
