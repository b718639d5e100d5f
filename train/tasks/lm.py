"""Next-token prediction on packed rows of text."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from isthmus.train.mesh import ROWS
from isthmus.train.tasks.task import Aux, Batch, Sums


def cross_entropy(
  logits: Float[Array, "b t v"], targets: Int[Array, "b t"]
) -> Float[Array, "b t"]:
  """`-log softmax(logits)[target]` in nats, with float32 statistics.

  Example:
    >>> nats = cross_entropy(jnp.zeros((1, 2, 4)), jnp.array([[0, 3]]))
    >>> print(nats)  # ln 4 each
    [[1.3862944 1.3862944]]
  """
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
  """Mean negative log-likelihood of each token given those before it.

  A batch holds `tokens` [b, t+1], `segment_ids` [b, t+1] and `weights` [b, t]
  (see `isthmus.data.text`). Evaluation gives `loss` in nats a token and
  `bits_per_byte`, nats over (bytes the tokens stand for) ln 2.

  Attributes:
    z_loss: weight of `logsumexp(logits)^2`, which keeps the normaliser near
      zero; 0 leaves it out.
    segments: False lets attention cross documents packed into one row.

  Example:
    >>> from isthmus.nets.transformer import Decoder
    >>> model = Decoder(vocab_size=16, width=8, depth=1, num_heads=2)
    >>> batch = {
    ...   "tokens": jnp.array([[0, 3, 1, 4]]),
    ...   "segment_ids": jnp.ones((1, 4), int),
    ...   "weights": jnp.ones((1, 3)),
    ...   "num_bytes": jnp.array([3]),
    ...   "valid": jnp.ones(1),
    ... }
    >>> task = NextToken()
    >>> params = task.init(model, batch, jax.random.key(0))["params"]
    >>> sums = task.evaluate(model, params, {}, batch)
    >>> result = task.summarize({k: float(v) for k, v in sums.items()})
    >>> f"{result['loss']:.1f} nats"  # untrained: near ln 16
    '2.8 nats'
  """

  z_loss: float = 0.0
  segments: bool = True

  def init(self, model: nn.Module, batch: Batch, key: PRNGKeyArray):
    """The model's variables, of a row's length."""
    return model.init(key, batch["tokens"][:, :-1])

  def _logits(self, model, params, mutables, batch, **kwargs):
    tokens, segments = batch["tokens"], batch["segment_ids"]
    return model.apply(
      {"params": params, **mutables},
      _split(tokens[:, :-1]),
      segment_ids=_split(segments[:, :-1]) if self.segments else None,
      **kwargs,
    )

  def loss(
    self,
    model: nn.Module,
    params: Any,
    mutables: dict[str, Any],
    batch: Batch,
    key: PRNGKeyArray,
  ) -> tuple[Float[Array, ""], Aux]:
    """Mean nats of the weighted tokens, with `z_loss` if there is one."""
    (logits, _), new = self._logits(
      model,
      params,
      mutables,
      batch,
      train=True,
      rngs={"dropout": key},
      mutable=list(mutables),
    )
    weights = batch["weights"].astype(jnp.float32)
    nats = cross_entropy(logits, batch["tokens"][:, 1:])
    total = jnp.maximum(weights.sum(), 1e-12)
    loss = jnp.sum(nats * weights) / total
    metrics = {}
    if self.z_loss:
      z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
      penalty = self.z_loss * jnp.sum(jnp.square(z) * weights) / total
      metrics["z_loss"] = penalty
      loss = loss + penalty
    aux = Aux(weight=weights.sum(), metrics=metrics, mutables=dict(new))
    return loss, aux

  def evaluate(
    self, model: nn.Module, params: Any, mutables: dict[str, Any], batch: Batch
  ) -> Sums:
    """Sums over the valid rows: nats, tokens, bytes."""
    logits, _ = self._logits(model, params, mutables, batch, train=False)
    valid = batch["valid"].astype(jnp.float32)
    weights = batch["weights"].astype(jnp.float32) * valid[:, None]
    nats = cross_entropy(logits, batch["tokens"][:, 1:])
    return {
      "nats": jnp.sum(nats * weights),
      "tokens": weights.sum(),
      "bytes": jnp.sum(batch["num_bytes"] * valid),
    }

  def summarize(self, sums: dict[str, float]) -> dict[str, float]:
    """`loss` in nats a token, and `bits_per_byte`."""
    return {
      "loss": sums["nats"] / sums["tokens"],
      "bits_per_byte": sums["nats"] / sums["bytes"] / math.log(2),
    }

  def throughput(
    self, model: nn.Module, batch_shapes: dict[str, tuple[int, ...]]
  ) -> tuple[str, int, float]:
    """Tokens, and the model's `flops_per_token` if it has that."""
    rows, length = batch_shapes["weights"]
    tokens = rows * length
    flops = getattr(model, "flops_per_token", None)
    return "tokens", tokens, tokens * flops(length) if flops else math.nan


def _split(x: Int[Array, "b t"]) -> Int[Array, "b t"]:
  """Rows over the batch axes and tokens over `seq`, if the mesh has those."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or "seq" not in mesh.axis_names:
    return x
  return jax.lax.with_sharding_constraint(x, jax.P(*ROWS, "seq"))
