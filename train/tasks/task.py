"""What the loop asks of a task: four pure functions on a frozen dataclass."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
from jaxtyping import Array, Float, PRNGKeyArray

#: Field name -> array of all rows.
Batch = dict[str, jax.Array]
#: Sums over a batch by name.
Sums = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
  """What a loss returns besides itself.

  Attributes:
    weight: what the loss is a mean over (tokens, rows), so that the means of
      micro-batches combine to the mean of the whole batch.
    metrics: scalars to log, means over the same weight.
    mutables: the model's collections other than `params`, after the step.

  Example:
    >>> aux = Aux(weight=jnp.asarray(8.0))  # a mean over 8 rows
    >>> [float(x) for x in jax.tree.leaves(aux)]
    [8.0]
  """

  weight: Float[Array, ""]
  metrics: dict[str, Float[Array, ""]] = dataclasses.field(default_factory=dict)
  mutables: dict[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
  """Turns a model and batches into numbers. `model` is a Linen module."""

  def init(
    self, model: nn.Module, batch: Batch, key: PRNGKeyArray
  ) -> dict[str, Any]:
    """Linen variables: `params`, and any other collection."""
    ...

  def loss(
    self,
    model: nn.Module,
    params: Any,
    mutables: dict[str, Any],
    batch: Batch,
    key: PRNGKeyArray,
  ) -> tuple[Float[Array, ""], Aux]:
    """The mean loss of a batch, and its Aux."""
    ...

  def evaluate(
    self, model: nn.Module, params: Any, mutables: dict[str, Any], batch: Batch
  ) -> Sums:
    """Sums over a batch; rows with `valid` = 0 are padding, counted as 0."""
    ...

  def summarize(self, sums: dict[str, float]) -> dict[str, float]:
    """Metrics of the sums over a whole evaluation set."""
    ...

  def throughput(
    self, model: nn.Module, batch_shapes: dict[str, tuple[int, ...]]
  ) -> tuple[str, int, float]:
    """(unit, units in a batch, model FLOPs of a training step on it)."""
    ...
