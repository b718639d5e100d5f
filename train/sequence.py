"""Whether, and how, the mesh axis `seq` divides the sequences of a job.

A task with a method `divide(model, devices)` says how the rows of a batch are
arranged for it; other tasks are refused.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from isthmus.data.source import Example

if TYPE_CHECKING:
  from isthmus.train.jobs import Fit


def arrangement(
  job: "Fit", mesh: jax.sharding.Mesh
) -> Callable[[Example], Example] | None:
  """What a loader puts rows in order with; None if `seq` has one device.

  Raises:
    ValueError: a task or a model that can't be divided.

  Example:
    >>> from isthmus.train.config import load
    >>> from isthmus.train.mesh import Mesh
    >>> job = load("quickstart:smoke")
    >>> arrangement(job, Mesh().build()) is None
    True
  """
  devices = mesh.shape["seq"]
  if devices == 1:
    return None
  divide = getattr(job.task, "divide", None)
  if divide is None:
    raise ValueError(
      f"mesh.seq is {devices}, and task {type(job.task).__name__} has no "
      "sequence to divide"
    )
  return divide(job.model, devices)


def check(job: "Fit", state: Any, batch: Any) -> None:
  """Traces the loss, so that what can't be divided is said before a step.

  Args:
    job: whose task and model they are.
    state: a `TrainState` of shapes.
    batch: shapes.

  Raises:
    ValueError: what a schedule refuses.

  Example:
    >>> from isthmus.train.config import load
    >>> from isthmus.train.loop import Run
    >>> job = load("quickstart:smoke")
    >>> run = Run(job)
    >>> check(job, run.target, run.batch) is None
    True
  """

  def loss(state, batch):
    key = jax.random.fold_in(state.key, state.step)
    rest = state.params, state.mutables, batch, key
    return job.task.loss(job.model, *rest)[0]

  try:
    jax.eval_shape(loss, state, batch)
  except NotImplementedError as error:
    raise ValueError(f"mesh.seq is {job.mesh.seq}: {error}") from error
