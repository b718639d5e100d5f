"""A class, or several regions, for every voxel."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from isthmus.train.metrics.dice import check_smooth, hard_dice, soft_dice
from isthmus.train.tasks.lm import cross_entropy
from isthmus.train.tasks.task import Aux, Batch, Sums

#: Labels [...] -> which regions each voxel lies in, bool [..., n].
Regions = Callable[[Any], Any]
_COUNTS = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
  """Mean of `1 - soft Dice` of `label` given `image`, over rows and classes.

  The model maps images [b, (z,) y, x, c] to logits [b, (z,) y, x, n], or to a
  pair (logits, aux). Without `regions` the classes exclude each other: label
  int [b, (z,) y, x] holds 0 to n - 1, probabilities are a softmax, and a voxel
  is given the likeliest class. With `regions` they may overlap: the function
  says which of n regions a label lies in, probabilities are sigmoids, and a
  voxel lies in each region of at least one half.

  The loss is a mean over rows of each row's own Dice, so micro-batches,
  devices and padding don't change it. Rows with `valid` = 0 are left out where
  the batch has that field. A label outside of 0 to n - 1 makes the loss NaN,
  which ends a run.

  Evaluation gives `loss`; `dice/NAME`, the hard Dice of each class from voxels
  counted over the whole evaluation set, which depends neither on the batch
  size nor on the devices; and `dice`, their mean.

  Attributes:
    regions: None, or a module-level function label -> bool [..., n].
    background: whether class 0 counts among the classes of the Dice.
    cross_entropy: weight of the mean cross-entropy of a row's voxels in nats,
      over all classes; with regions, of the mean binary cross-entropy. 0
      leaves it out.
    smooth: s of the soft Dice, in voxels.
    names: one for each logit, for the figures; () numbers them from 0.

  Raises:
    ValueError: a negative weight, smooth not above 0, names that repeat, a
      background beside regions; when called, numbers of logits, names and
      regions that differ, labels of another shape than the image.

  Example:
    >>> task, model = Segment(names=("none", "grey")), nn.Dense(2)
    >>> batch = {
    ...   "image": jnp.ones((1, 4, 4, 4, 1)),
    ...   "label": jnp.zeros((1, 4, 4, 4), int).at[:, 2:].set(1),
    ...   "valid": jnp.ones(1),
    ... }
    >>> params = {"kernel": jnp.array([[0.0, 5.0]]), "bias": jnp.zeros(2)}
    >>> sums = task.evaluate(model, params, {}, batch)
    >>> result = task.summarize({k: float(v) for k, v in sums.items()})
    >>> print(f"{result['dice/grey']:.3f}")  # grey everywhere, half is right
    0.667

  Reference: the loss of https://arxiv.org/abs/2104.09648, with three regions.
  """

  regions: Regions | None = None
  background: bool = False
  cross_entropy: float = 0.0
  smooth: float = 1.0
  names: tuple[str, ...] = ()

  def __post_init__(self):
    if not 0 <= self.cross_entropy < math.inf:
      raise ValueError(
        f"cross_entropy is {self.cross_entropy}; it is at least 0 and finite"
      )
    check_smooth(self.smooth)
    if len(set(self.names)) < len(self.names):
      raise ValueError(
        f"names are {self.names}: {len(self.names)} of which "
        f"{len(set(self.names))} differ; give each class its own"
      )
    if self.regions is not None and self.background:
      raise ValueError(
        "background=True beside regions, which have none; leave it False"
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
    """1 - soft Dice, with the weighted cross-entropy added if there is one."""
    out, new = model.apply(
      {"params": params, **mutables},
      batch["image"],
      train=True,
      rngs={"dropout": key},
      mutable=list(mutables),
    )
    logits = self._logits(out, batch)
    dice, nats = self._rows(logits, batch["label"])
    rows = len(batch["label"])
    valid = batch.get("valid", jnp.ones(rows)).astype(jnp.float32)
    weight = valid.sum()

    def mean(x):
      return _total(x, valid) / jnp.maximum(weight, 1e-12)

    metrics = {"soft_dice": mean(dice)}
    loss = mean(1 - dice)
    if self.cross_entropy:
      metrics["cross_entropy"] = mean(nats)
      loss = loss + self.cross_entropy * metrics["cross_entropy"]
    return loss, Aux(weight=weight, metrics=metrics, mutables=dict(new))

  def evaluate(
    self, model: nn.Module, params: Any, mutables: dict[str, Any], batch: Batch
  ) -> Sums:
    """Sums over the valid rows: loss, rows, and voxels of each class.

    Those are int32: `overlap/NAME` predicted and true, `predicted/NAME`,
    `true/NAME`.
    """
    out = model.apply({"params": params, **mutables}, batch["image"])
    logits, label = self._logits(out, batch), batch["label"]
    if label.size >= _COUNTS:
      raise ValueError(
        f"a batch of {label.size} voxels is counted in 32 bits, fewer than "
        f"{_COUNTS}; set a smaller eval_batch_size"
      )
    dice, nats = self._rows(logits, label)
    valid = batch["valid"].astype(jnp.float32)
    real = (valid > 0).reshape(-1, *[1] * label.ndim)
    true = self._truth(label, logits.shape[-1]) & real
    predicted = self._prediction(logits) & real
    counts = {
      "overlap": true & predicted,
      "predicted": predicted,
      "true": true,
    }
    sums = {
      "loss": _total(1 - dice + self.cross_entropy * nats, valid),
      "rows": valid.sum(),
    }
    for kind, where in counts.items():
      numbers = where.sum(tuple(range(label.ndim)), dtype=jnp.int32)
      for i, name in self._counted(logits.shape[-1]).items():
        sums[f"{kind}/{name}"] = numbers[i]
    return sums

  def summarize(self, sums: dict[str, float]) -> dict[str, float]:
    """`loss`, `dice/NAME` of each class, and `dice`, their mean."""
    names = [k.partition("/")[2] for k in sums if k.startswith("overlap/")]
    values = hard_dice(
      *(
        [sums[f"{kind}/{name}"] for name in names]
        for kind in ("overlap", "predicted", "true")
      )
    )
    return {
      "loss": sums["loss"] / sums["rows"],
      "dice": sum(values) / len(values),
      **{f"dice/{n}": v for n, v in zip(names, values, strict=True)},
    }

  def throughput(
    self, model: nn.Module, batch_shapes: dict[str, tuple[int, ...]]
  ) -> tuple[str, int, float]:
    """Voxels (pixels in 2D), and the model's `flops_per_row` if it has that."""
    rows, *shape = batch_shapes["image"]
    unit = "voxels" if len(shape) == 4 else "pixels"
    flops = getattr(model, "flops_per_row", None)
    count = rows * math.prod(shape[:-1])
    return unit, count, rows * flops(tuple(shape)) if flops else math.nan

  def _logits(self, out: Any, batch: Batch) -> Float[Array, "b *space n"]:
    logits = out[0] if isinstance(out, tuple) else out
    label, n = batch["label"], logits.shape[-1]
    if logits.shape[:-1] != label.shape:
      raise ValueError(
        f"logits are {logits.shape}, labels {label.shape}; there must be n "
        "logits for every label"
      )
    if self.names and len(self.names) != n:
      raise ValueError(
        f"the model gives {n} logits, names are {len(self.names)}: "
        f"{self.names}; they must be as many"
      )
    if self.regions is None and n < 2:
      raise ValueError(
        f"the model gives {n} logits; classes that exclude each other are at "
        "least 2"
      )
    return logits.astype(jnp.float32)

  def _counted(self, n: int) -> dict[int, str]:
    """Number of a logit -> name, of the classes whose Dice counts."""
    names = self.names or tuple(map(str, range(n)))
    first = int(self.regions is None and not self.background)
    return {i: names[i] for i in range(first, n)}

  def _truth(
    self, label: Int[Array, "b *space"], n: int
  ) -> Bool[Array, "b *space n"]:
    if self.regions is None:
      return jax.nn.one_hot(label, n, dtype=bool)
    where = self.regions(label)
    if where.shape != (*label.shape, n) or where.dtype != bool:
      raise ValueError(
        f"regions of labels {label.shape} are {where.dtype} {where.shape}; "
        f"for {n} logits they must be bool {(*label.shape, n)}"
      )
    return where

  def _prediction(
    self, logits: Float[Array, "b *space n"]
  ) -> Bool[Array, "b *space n"]:
    if self.regions is not None:
      return logits >= 0
    n = logits.shape[-1]
    return jax.nn.one_hot(logits.argmax(-1), n, dtype=bool)

  def _rows(
    self, logits: Float[Array, "b *space n"], label: Int[Array, "b *space"]
  ) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """(mean soft Dice of the classes, cross-entropy in nats) of each row."""
    rows, n = logits.shape[0], logits.shape[-1]
    truth = self._truth(label, n)
    if self.regions is not None:
      p = jax.nn.sigmoid(logits)
      nats = optax.sigmoid_binary_cross_entropy(logits, truth)
    else:
      p = jax.nn.softmax(logits)
      nats = cross_entropy(logits.reshape(rows, -1, n), label.reshape(rows, -1))
    dice = soft_dice(p, truth, smooth=self.smooth)
    dice = dice[:, jnp.array(list(self._counted(n)))].mean(-1)
    if self.regions is None:
      inside = (label >= 0) & (label < n)
      known = inside.reshape(rows, -1).all(-1)
      dice = jnp.where(known, dice, jnp.nan)
    return dice, nats.reshape(rows, -1).mean(-1)


def _total(x: Float[Array, "b"], valid: Float[Array, "b"]) -> Float[Array, ""]:
  """The sum over valid rows. Padding may have labels that make NaN."""
  return jnp.sum(jnp.where(valid > 0, x, 0.0))
