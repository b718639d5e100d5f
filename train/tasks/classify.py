"""One label for each row."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from isthmus.train.tasks.task import Aux, Batch, Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify:
  """Mean cross-entropy of `label` [b] given `image` [b, ...].

  The model maps images to logits [b, v], or to a pair (logits, aux).
  Evaluation gives `loss` in nats and `accuracy`.

  Attributes:
    smoothing: weight of the uniform distribution in the target.

  Example:
    >>> task, model = Classify(), nn.Dense(2)
    >>> batch = {
    ...   "image": jnp.eye(4),
    ...   "label": jnp.array([0, 1, 0, 1]),
    ...   "valid": jnp.array([1.0, 1.0, 1.0, 0.0]),  # the last row is padding
    ... }
    >>> params = task.init(model, batch, jax.random.key(0))["params"]
    >>> sums = task.evaluate(model, params, {}, batch)
    >>> float(sums["rows"])
    3.0
    >>> task.summarize({"nats": 6.0, "hits": 2.0, "rows": 3.0})["loss"]
    2.0
  """

  smoothing: float = 0.0

  def __post_init__(self):
    if not 0 <= self.smoothing < 1:
      raise ValueError(
        f"smoothing is {self.smoothing}; it is at least 0 and below 1"
      )

  def init(self, model: nn.Module, batch: Batch, key: PRNGKeyArray):
    """The model's variables, of an image's shape."""
    return model.init(key, batch["image"])

  def loss(
    self,
    model: nn.Module,
    params: Any,
    mutables: dict[str, Any],
    batch: Batch,
    key: PRNGKeyArray,
  ) -> tuple[Float[Array, ""], Aux]:
    """Mean cross-entropy in nats, with the accuracy beside it."""
    out, new = model.apply(
      {"params": params, **mutables},
      batch["image"],
      train=True,
      rngs={"dropout": key},
      mutable=list(mutables),
    )
    logits = _logits(out)
    nats = self._nats(logits, batch["label"])
    hits = jnp.mean(logits.argmax(-1) == batch["label"])
    weight = jnp.asarray(len(nats), jnp.float32)
    metrics = {"accuracy": hits.astype(jnp.float32)}
    return nats.mean(), Aux(weight=weight, metrics=metrics, mutables=dict(new))

  def evaluate(
    self, model: nn.Module, params: Any, mutables: dict[str, Any], batch: Batch
  ) -> Sums:
    """Sums over the valid rows: nats, hits, rows."""
    out = model.apply({"params": params, **mutables}, batch["image"])
    logits, valid = _logits(out), batch["valid"].astype(jnp.float32)
    hits = (logits.argmax(-1) == batch["label"]) * valid
    nats = Classify()._nats(logits, batch["label"]) * valid
    return {"nats": nats.sum(), "hits": hits.sum(), "rows": valid.sum()}

  def summarize(self, sums: dict[str, float]) -> dict[str, float]:
    """`loss` in nats a row, and `accuracy`."""
    return {
      "loss": sums["nats"] / sums["rows"],
      "accuracy": sums["hits"] / sums["rows"],
    }

  def throughput(
    self, model: nn.Module, batch_shapes: dict[str, tuple[int, ...]]
  ) -> tuple[str, int, float]:
    """Images, and the model's `flops_per_row` if it has that."""
    rows, *shape = batch_shapes["image"]
    flops = getattr(model, "flops_per_row", None)
    return "images", rows, rows * flops(tuple(shape)) if flops else math.nan

  def _nats(self, logits, labels) -> Float[Array, "b"]:
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    even = log_p.mean(-1)
    return -(1 - self.smoothing) * picked - self.smoothing * even


def _logits(out: Any) -> Float[Array, "b v"]:
  return out[0] if isinstance(out, tuple) else out
