"""The state of a run, and the one pure step that changes it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from isthmus.train.optim.fuse import advance
from isthmus.train.tasks.task import Batch, Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a checkpoint holds; no functions.

  The same tree also carries shapes, and shardings, so its fields are untyped.

  Attributes:
    step: optimiser steps done, int32 [].
    params: the model's parameters.
    opt_state: the optimiser's state.
    mutables: the model's other collections (running statistics).
    key: the run's typed key; step `i` uses `fold_in(key, i)`.
    ema: running average of the parameters, or None.

  Example:
    >>> state = TrainState(
    ...   step=jnp.zeros((), jnp.int32),
    ...   params={"w": jnp.ones(3)},
    ...   opt_state=(),
    ...   mutables={},
    ...   key=jax.random.key(0),
    ... )
    >>> jax.tree.map(jnp.shape, state.params)
    {'w': (3,)}
  """

  step: Any
  params: Any
  opt_state: Any
  mutables: dict[str, Any]
  key: Any
  ema: Any = None


#: What `make_step` gives.
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_init(
  model: nn.Module,
  task: Task,
  tx: optax.GradientTransformation,
  batch: dict[str, jax.ShapeDtypeStruct],
  *,
  seed: int,
  ema: float | None = None,
) -> Callable[[], TrainState]:
  """A pure function that makes the first state; jit it with out_shardings.

  Example:
    >>> from isthmus.train.tasks.classify import Classify
    >>> batch = {"image": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    >>> init = make_init(nn.Dense(2), Classify(), optax.sgd(0.1), batch, seed=0)
    >>> jax.tree.map(jnp.shape, init().params)
    {'bias': (2,), 'kernel': (4, 2)}
  """

  def init() -> TrainState:
    params_key, run_key = jax.random.split(jax.random.key(seed))
    one = {k: jnp.zeros((1, *s.shape[1:]), s.dtype) for k, s in batch.items()}
    variables = dict(task.init(model, one, params_key))
    params = variables.pop("params")
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=tx.init(params),
      mutables=variables,
      key=run_key,
      ema=params if ema is not None else None,
    )

  return init


def make_step(
  model: nn.Module,
  task: Task,
  tx: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  ema: float | None = None,
) -> Step:
  """The training step `(state, batch) -> (state, metrics)`, pure.

  With `accumulate` = a, the batch is cut into a micro-batches whose gradients
  are averaged by their weight, `sum(w_i g_i) / sum(w_i)`: the gradient of the
  whole batch, in 1/a of its activation memory. Micro-batch i takes rows
  i, i + a, i + 2a, ..., so that every device keeps the rows it has.

  Args:
    model: a Linen module.
    task: see `isthmus.train.tasks.task`.
    tx: an optax transformation. One that is `Fused` takes the step itself,
      see `isthmus.train.optim.fuse`.
    accumulate: number of micro-batches; divides the batch's rows.
    ema: decay d of `ema <- d ema + (1 - d) params`, or None.

  Returns:
    A function to jit with the state donated. Metrics are `loss`, `grad_norm`
    and the task's own, all float32 scalars.

  Example:
    >>> from isthmus.nets.mlp import Mlp
    >>> from isthmus.train.tasks.classify import Classify
    >>> batch = {"image": jnp.eye(4), "label": jnp.arange(4)}
    >>> parts = Mlp(16), Classify(), optax.sgd(0.1)
    >>> state = make_init(*parts, jax.eval_shape(lambda: batch), seed=0)()
    >>> step = jax.jit(make_step(*parts), donate_argnums=0)
    >>> state, metrics = step(state, batch)
    >>> int(state.step), sorted(metrics)
    (1, ['accuracy', 'grad_norm', 'loss'])
  """

  def gradient(params, mutables, batch, key):
    def loss(p):
      return task.loss(model, p, mutables, batch, key)

    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, aux.mutables, aux.weight, {"loss": value, **aux.metrics}

  def accumulated(params, mutables, batch, key):
    micro = jax.tree.map(lambda x: _cut(x, accumulate), batch)

    def body(carry, xs):
      total, mutables, weight = carry
      index, rows = xs
      grads, mutables, w, metrics = gradient(
        params, mutables, rows, jax.random.fold_in(key, index)
      )
      total = jax.tree.map(lambda t, g: t + w * g.astype(t.dtype), total, grads)
      return (total, mutables, weight + w), (w, metrics)

    zeros = jax.tree.map(
      lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
      params,
    )
    carry = (zeros, mutables, jnp.zeros((), jnp.float32))
    (total, mutables, weight), (weights, metrics) = jax.lax.scan(
      body, carry, (jnp.arange(accumulate), micro)
    )
    weight = jnp.maximum(weight, 1e-12)
    grads = jax.tree.map(
      lambda t, p: (t / weight).astype(p.dtype), total, params
    )
    share = weights / weight
    return grads, mutables, {k: jnp.sum(share * v) for k, v in metrics.items()}

  def step(state: TrainState, batch: Batch):
    key = jax.random.fold_in(state.key, state.step)
    args = (state.params, state.mutables, batch, key)
    if accumulate == 1:
      grads, mutables, _, metrics = gradient(*args)
    else:
      grads, mutables, metrics = accumulated(*args)
    params, opt_state = advance(tx, state.params, grads, state.opt_state)
    average = state.ema
    if ema is not None:
      average = jax.tree.map(
        lambda a, p: a + (1 - ema) * (p - a).astype(a.dtype), average, params
      )
    metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
    metrics = {k: v.astype(jnp.float32) for k, v in metrics.items()}
    new = TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      mutables=mutables,
      key=state.key,
      ema=average,
    )
    return new, metrics

  return step


def _cut(x: jax.Array, parts: int) -> jax.Array:
  """[b, ...] -> [parts, b / parts, ...], part i holding rows i, i+parts, ..."""
  if x.shape[0] % parts:
    raise ValueError(f"{x.shape[0]} rows do not cut into {parts} micro-batches")
  return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
