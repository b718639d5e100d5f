"""The suite of tasks can fail: a broken task for each of its checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train.tasks.classify import Classify
from tests.train.tasks import suite
from tests.train.tasks.suite import Entry
from tests.train.tasks.test_tasks import Net, _images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Classify):
  """Classification with one defect."""

  defect: str = "none"

  def loss(self, model, params, mutables, batch, key):
    if self.defect == "one key for all steps":
      key = jax.random.key(0)
    loss, aux = super().loss(model, params, mutables, batch, key)
    if self.defect == "weight":
      aux = dataclasses.replace(aux, weight=jnp.ones(()))
    if self.defect == "sum for a mean":
      loss = loss * aux.weight
    if self.defect == "mutables":
      aux = dataclasses.replace(aux, mutables={})
    if self.defect == "old mutables":
      aux = dataclasses.replace(aux, mutables=mutables)
    if self.defect == "narrow":
      loss = loss.astype(jnp.bfloat16).astype(jnp.float16)
    if self.defect == "no gradient":
      loss = jax.lax.stop_gradient(loss)
    if self.defect == "uphill":
      loss = loss - 2 * loss + 2 * jax.lax.stop_gradient(loss)
    if self.defect == "new at each trace":
      loss = loss * np.random.default_rng().uniform(0.5, 2)
    return loss, aux

  def evaluate(self, model, params, mutables, batch):
    if self.defect == "padding":
      batch = {**batch, "valid": jnp.ones_like(batch["valid"])}
    sums = super().evaluate(model, params, mutables, batch)
    if self.defect == "mean for a sum":
      sums["nats"] = sums["nats"] / sums["rows"]
    return sums

  def throughput(self, model, batch_shapes):
    unit, units, flops = super().throughput(model, batch_shapes)
    return unit, 8 if self.defect == "units" else units, flops


def _entry(defect):
  return Entry(
    name=defect,
    task=Broken(defect=defect),
    model=lambda **kwargs: Net(4, **kwargs),
    batch=_images,
  )


@pytest.mark.parametrize(
  "defect, assertion, message",
  [
    ("narrow", suite.assert_the_protocol_is_kept, "loss is float16"),
    ("no gradient", suite.assert_the_protocol_is_kept, "gradients are 0"),
    ("weight", suite.assert_parts_combine_by_weight, "the parts weigh 2"),
    ("sum for a mean", suite.assert_micro_batches_change_nothing, "=4: .* off"),
    ("padding", suite.assert_padding_changes_nothing, "with padding"),
    ("mean for a sum", suite.assert_sums_add_up, "sums of parts: .'nats"),
    ("uphill", suite.assert_a_batch_is_learned, "the loss went from"),
    ("new at each trace", suite.assert_jit_changes_nothing, "without jit"),
    (
      "one key for all steps",
      suite.assert_the_key_decides,
      "another key, the same loss",
    ),
    ("mutables", suite.assert_mutables_come_back, "come back as {}"),
    ("old mutables", suite.assert_mutables_come_back, "don't change"),
    ("units", suite.assert_throughput_counts_units, "twice as many"),
  ],
)
def test_a_broken_task_is_found(defect, assertion, message):
  with pytest.raises(AssertionError, match=message):
    assertion(_entry(defect))
