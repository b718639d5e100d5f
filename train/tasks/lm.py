"""Next-token prediction on packed rows of text."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from isthmus.attention.layer import parts
from isthmus.attention.sdpa import attention
from isthmus.attention.sequence import sequence_attention
from isthmus.attention.shard import place
from isthmus.attention.zigzag import Layout, zigzag, zigzag_positions
from isthmus.data.source import Example
from isthmus.nets.transformer import Decoder
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

  On a mesh whose axis `seq` has several devices each has some tokens of a row,
  and attention goes round them (`isthmus.attention.ring_attention`). Then a
  batch, which `divide` has arranged in the loader, holds `tokens`, `targets`,
  `segment_ids` and `weights` [b, t] in the order of the layout.

  Attributes:
    z_loss: weight of `logsumexp(logits)^2`, which keeps the normaliser near
      zero; 0 leaves it out.
    segments: False lets attention cross documents packed into one row.
    schedule: what the devices of `seq` send each other, see `ring_attention`.
    layout: which tokens each of them has; "zigzag" gives all the same work.

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
  schedule: Literal[
    "auto", "kv_ring", "kv_ring_bidir", "token_ring", "all_gather", "ulysses"
  ] = "auto"
  layout: Layout = "zigzag"

  def init(self, model: nn.Module, batch: Batch, key: PRNGKeyArray):
    """The model's variables, of a row's length."""
    return model.init(key, _fields(batch)[0])

  def divide(
    self, model: nn.Module, devices: int
  ) -> Callable[[Example], Example]:
    """What arranges rows for so many devices of the axis `seq`, in a loader.

    Raises:
      ValueError: a model whose tokens meet otherwise than in `attention`; when
        called, rows that the devices don't divide.
    """
    _divided(model, devices)
    return functools.partial(arrange, devices=devices, layout=self.layout)

  def _logits(self, model, params, mutables, batch, **kwargs):
    tokens, _, segments = _fields(batch)
    devices = jax.sharding.get_abstract_mesh().shape.get("seq", 1)
    if devices > 1:
      arranged = self.layout if "targets" in batch else "contiguous"
      model = _divided(model, devices, schedule=self.schedule, layout=arranged)
      if arranged == "zigzag":
        positions = zigzag_positions(tokens.shape[1], devices)
        kwargs["positions"] = jnp.asarray(positions)[None]
    return model.apply(
      {"params": params, **mutables},
      place(tokens),
      segment_ids=place(segments) if self.segments else None,
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
    nats = cross_entropy(logits, _fields(batch)[1])
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
    nats = cross_entropy(logits, _fields(batch)[1])
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


def arrange(rows: Example, *, devices: int, layout: Layout) -> Example:
  """Rows of `isthmus.data.text` as the axis `seq` divides them.

  Args:
    rows: `tokens` and `segment_ids` [b, t+1], `weights` [b, t], and fields
      without tokens, which stay.
    devices: of the axis.
    layout: "zigzag" or "contiguous".

  Returns:
    `tokens`, `targets`, `segment_ids` and `weights` [b, t] in that order.

  Raises:
    ValueError: rows that the devices don't divide.

  Example:
    >>> import numpy as np
    >>> rows = {"tokens": np.arange(9)[None], "weights": np.ones((1, 8))}
    >>> rows["segment_ids"] = np.ones((1, 9), np.int32)
    >>> made = arrange(rows, devices=2, layout="zigzag")
    >>> made["tokens"].tolist(), made["targets"].tolist()
    ([[0, 1, 6, 7, 2, 3, 4, 5]], [[1, 2, 7, 8, 3, 4, 5, 6]])
  """
  tokens, targets, segments = _fields(rows)
  length, parts = tokens.shape[1], devices * (1 + (layout == "zigzag"))
  if length % parts:
    raise ValueError(
      f"mesh.seq is {devices}, and rows of {length} tokens are not a multiple "
      f"of {parts}, as task.layout={layout} needs; change data.seq_len"
    )
  fields = {
    "tokens": tokens,
    "targets": targets,
    "segment_ids": segments,
    "weights": rows["weights"],
  }
  if layout == "zigzag":
    fields = {name: zigzag(x, devices) for name, x in fields.items()}
  return {**rows, **fields}


def _fields(batch):
  """(tokens, targets, segment ids) [b, t], of either kind of batch."""
  tokens, segments = batch["tokens"], batch["segment_ids"]
  if "targets" in batch:
    return tokens, batch["targets"], segments
  return tokens[:, :-1], tokens[:, 1:], segments[:, :-1]


def _divided(model: Any, devices: int, **settings: Any) -> Any:
  """The model with its attention divided over the devices of `seq`."""
  if type(model) is not Decoder:
    raise ValueError(
      f"mesh.seq is {devices}, and model is a {type(model).__name__}: of a "
      "Decoder it is known that tokens meet in attention only"
    )
  function, bound = parts(model.attend)
  if function is not attention:
    name = getattr(function, "__name__", function)
    raise ValueError(
      f"mesh.seq is {devices}, and model.attend is {name}: only attention is "
      "divided"
    )
  if unknown := bound.keys() - _BOUND:
    raise ValueError(
      f"mesh.seq is {devices}, and model.attend has {', '.join(unknown)}: "
      "divided, it has none"
    )
  attend = functools.partial(sequence_attention, **settings, **bound)
  return model.clone(attend=attend)


# Of `attention`, what a model may bind and still be divided.
_BOUND = {"window", "scale", "softcap", "shard_axes", "impl"}
