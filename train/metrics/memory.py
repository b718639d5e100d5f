"""What a training step will take, from its compiled program alone."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from isthmus.train.tasks.task import Task


def step_bytes(model: nn.Module, task: Task, shape: tuple[int, ...]) -> int:
  """Bytes that the gradient of a loss takes besides inputs and outputs.

  The step is compiled for the default backend and not run, so that it may be
  larger than the device. What XLA plans there is what it allocates.

  Args:
    model: maps images to logits for every voxel.
    task: of images and labels, such as `Segment`.
    shape: of the image, [b, ..., c]; the labels have all of it but c.

  Raises:
    ValueError: a backend that doesn't tell.

  Example:
    >>> from isthmus.nets.mlp import Mlp
    >>> from isthmus.train.tasks.segment import Segment
    >>> small, large = (
    ...   step_bytes(Mlp(8), Segment(), (1, n, n, n, 2)) for n in (8, 16)
    ... )
    >>> large > 4 * small
    True
  """
  batch = {
    "image": jax.ShapeDtypeStruct(shape, jnp.float32),
    "label": jax.ShapeDtypeStruct(shape[:-1], jnp.int32),
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = dict(
    jax.eval_shape(lambda b, k: task.init(model, b, k), batch, key)
  )
  params = variables.pop("params")

  def gradient(params, mutables, batch, key):
    def loss(params):
      return task.loss(model, params, mutables, batch, key)

    return jax.value_and_grad(loss, has_aux=True)(params)

  compiled = jax.jit(gradient).lower(params, variables, batch, key).compile()
  found = compiled.memory_analysis()
  if found is None:
    raise ValueError(f"{jax.default_backend()} tells no memory of a program")
  return found.temp_size_in_bytes


def largest(
  need: Callable[[int], float],
  budget: float,
  *,
  low: int,
  high: int,
  step: int = 1,
) -> int:
  """The largest n in low, low + step, ..., high whose need fits the budget.

  By bisection: need must not fall where n grows.

  Args:
    need: of n; it may be costly.
    budget: the most that it may be.
    low, high: the ends of the search, `step` apart.

  Raises:
    ValueError: ends that no step joins, or a need above the budget at low.

  Example:
    >>> largest(lambda n: n**3, 1000, low=2, high=64, step=2)
    10
  """
  if step < 1 or high < low or (high - low) % step:
    raise ValueError(f"no steps of {step} lead from {low} to {high}")
  if need(low) > budget:
    raise ValueError(f"{low} already needs {need(low):g}, above {budget:g}")
  good, bad = 0, (high - low) // step + 1
  # Outwards first: what is far too large is the dearest to compile.
  stride = 1
  while good + stride < bad and need(low + (good + stride) * step) <= budget:
    good, stride = good + stride, 2 * stride
  bad = min(bad, good + stride)
  while bad - good > 1:
    middle = (good + bad) // 2
    if need(low + middle * step) <= budget:
      good = middle
    else:
      bad = middle
  return low + good * step
