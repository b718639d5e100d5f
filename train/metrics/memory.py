"""What a training step will take, from its compiled program alone."""

import functools
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
  power: float = 1.0,
) -> int:
  """The largest n in low, low + step, ..., high whose need fits the budget.

  need must not fall where n grows. It is asked about four times where it is
  nearly a straight line in n^power, and never more than 4 log2 of the steps.

  Args:
    need: of n; it may be costly.
    budget: the most that it may be.
    low, high: the ends of the search, `step` apart.
    power: 3 for voxels by the side of a cube.

  Raises:
    ValueError: ends that no step joins, or a need above the budget at low.

  Example:
    >>> largest(lambda n: n**3, 1000, low=2, high=64, step=2, power=3)
    10
  """
  if step < 1 or high < low or (high - low) % step:
    raise ValueError(f"no steps of {step} lead from {low} to {high}")
  need = functools.cache(need)
  if need(low) > budget:
    raise ValueError(f"{low} already needs {need(low):g}, above {budget:g}")
  good, bad, before = low, high + step, None
  slow = 0
  while bad - good > step:
    # Outwards first: what is far too large is the dearest to compile.
    other = bad if bad <= high else before
    if other is None:
      n = good + step
    elif slow > 2 or need(other) == need(good):
      n = (good + bad) // 2
    else:
      slope = (other**power - good**power) / (need(other) - need(good))
      n = (good**power + slope * (budget - need(good))) ** (1 / power)
    # The last step below n, but a new one.
    n = low + int((n - low) // step) * step
    n = min(max(n, good + step), bad - step)
    width = bad - good
    if need(n) <= budget:
      before, good = good, n
    else:
      bad = n
    slow = 0 if slow > 2 or bad - good <= width / 2 else slow + 1
  return good
