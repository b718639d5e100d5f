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
  """

  smoothing: float = 0.0

  def __post_init__(self):
    if not 0 <= self.smoothing < 1:
      raise ValueError(
        f"smoothing is {self.smoothing}; it is at least 0 and below 1"
      )

  def init(self, model: nn.Module, batch: Batch, key: PRNGKeyArray):
    return model.init(key, batch["image"])

  def loss(
    self,
    model: nn.Module,
    params: Any,
    mutables: dict[str, Any],
    batch: Batch,
    key: PRNGKeyArray,
  ) -> tuple[Float[Array, ""], Aux]:
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
    out = model.apply({"params": params, **mutables}, batch["image"])
    logits, valid = _logits(out), batch["valid"].astype(jnp.float32)
    hits = (logits.argmax(-1) == batch["label"]) * valid
    nats = Classify()._nats(logits, batch["label"]) * valid
    return {"nats": nats.sum(), "hits": hits.sum(), "rows": valid.sum()}

  def summarize(self, sums: dict[str, float]) -> dict[str, float]:
    return {
      "loss": sums["nats"] / sums["rows"],
      "accuracy": sums["hits"] / sums["rows"],
    }

  def throughput(
    self, model: nn.Module, batch_shapes: dict[str, tuple[int, ...]]
  ) -> tuple[str, int, float]:
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
