"""A mesh axis `seq`: the same loss and gradients as on one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import attention, moba
from isthmus.attention.schedule import SCHEDULES
from isthmus.nets.transformer import Decoder
from isthmus.train import cli, loop, sequence
from isthmus.train.config import ConfigError
from isthmus.train.mesh import Mesh
from isthmus.train.tasks.lm import NextToken
from tests.train import toy
from tests.train.child import records
from tests.train.test_loop import Compiled, First
from tests.train.test_loop import _decoder as decoder

pytestmark = pytest.mark.once

MESHES = {
  "data2 seq4": Mesh(data=2, seq=4),
  "fsdp2 model2 seq2": Mesh(data=1, fsdp=2, model=2, seq=2),
}


def gradients(job):
  """(loss, weight, gradients) of the first batch, on the job's mesh."""
  run = loop.Run(job)
  with jax.set_mesh(run.mesh):
    state, batch = run.init(), run.train.batch(0)

    def loss(params):
      key = jax.random.key(0)
      value, aux = job.task.loss(job.model, params, state.mutables, batch, key)
      return value, aux.weight

    call = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, weight), grads = call(state.params)
    evaluated = run.evaluate(state)
  return jax.tree.map(np.asarray, (value, weight, grads, evaluated))


@functools.cache
def alone(**changes):
  """On one device."""
  return gradients(decoder(mesh=First(), eval_every=None, **changes))


def same(got, want, atol=1e-6):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", MESHES)
def test_equals_one_device(name):
  """Documents are packed, and attention goes round the devices."""
  job = decoder(mesh=MESHES[name], eval_every=None)
  same(gradients(job), alone())


@pytest.mark.parametrize(
  "schedule, layout",
  [
    ("token_ring", "zigzag"),
    ("ulysses", "contiguous"),
    *(
      pytest.param(schedule, layout, marks=pytest.mark.slow)
      for schedule in SCHEDULES
      for layout in ("zigzag", "contiguous")
    ),
  ],
)
def test_settings_of_the_task(schedule, layout):
  task = NextToken(schedule=schedule, layout=layout)
  mesh = Mesh(data=4, seq=2)
  job = decoder(mesh=mesh, task=task, eval_every=None)
  same(gradients(job), alone())


CHANGES = {
  "remat": {"scan": True, "depth": 2, "mode": "remat"},
  "reversible": {"scan": True, "depth": 2, "mode": "reversible"},
  "window": {"attend": functools.partial(attention, window=(5, 0), impl="xla")},
}


@pytest.mark.parametrize(
  "name",
  [pytest.param("remat", marks=pytest.mark.slow), "reversible", "window"],
)
def test_models(name):
  model = dataclasses.replace(decoder().model, **CHANGES[name])
  rules = decoder().rules
  job = decoder(mesh=Mesh(data=4, seq=2), model=model, rules=rules)
  got = gradients(job)
  want = gradients(dataclasses.replace(job, mesh=First()))
  # Two streams lie on a grid, to which other sums round otherwise.
  same(got, want, 2e-5 if name == "reversible" else 1e-6)
  assert abs(want[0] - alone()[0]) > 1e-6  # of another model


@pytest.mark.parametrize("name", MESHES)
def test_what_a_step_sends(name):
  """Keys and values to neighbours; parameters are gathered, nothing else."""
  job = decoder(mesh=MESHES[name])
  run = Compiled(job)
  text = Compiled.text
  gathered = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* all-gather", text)
  assert bool(gathered) == (job.mesh.fsdp > 1)
  sizes = {x.size for x in jax.tree.leaves(run.target.params)}
  sizes |= {size // job.mesh.model for size in sizes}
  for dtype, shape in gathered:
    assert dtype == "f32"
    assert np.prod([int(x) for x in shape.split(",")]) in sizes, shape
  assert "collective-permute" in text
  assert "all-to-all" not in text


def test_rows_come_arranged():
  """By the loader, so that no step has to; of the same tokens."""
  run = loop.Run(decoder(mesh=Mesh(data=2, seq=4)))
  plain = loop.Run(decoder(mesh=First())).train.host_batch(0)
  batch = run.train.batch(0)
  order = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
  np.testing.assert_array_equal(batch["tokens"], plain["tokens"][:, order])
  targets = plain["tokens"][:, 1:][:, order]
  np.testing.assert_array_equal(batch["targets"], targets)
  np.testing.assert_array_equal(batch["weights"], plain["weights"][:, order])
  assert {k: v.shape for k, v in batch.items()} == {
    k: v.shape for k, v in run.batch.items()
  }


def test_the_loss_of_rows_that_no_loader_arranged():
  """Are taken as they stand, each device having consecutive tokens."""
  job = decoder(mesh=Mesh(data=2, seq=4))
  run = loop.Run(job)
  plain = loop.Run(dataclasses.replace(job, mesh=First())).train.host_batch(0)
  with jax.set_mesh(run.mesh):
    params = run.init().params
    call = jax.jit(
      lambda params, batch: job.task.loss(
        job.model, params, {}, batch, jax.random.key(0)
      )[0]
    )
    value = call(params, jax.tree.map(jnp.asarray, plain))
  np.testing.assert_allclose(value, alone()[0], rtol=1e-5)


@pytest.mark.parametrize(
  "accumulate", [pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_a_run(tmp_path, accumulate):
  losses = []
  for name, mesh in (("one", First()), ("many", Mesh(data=2, seq=4))):
    decoder(mesh=mesh, accumulate=accumulate, steps=3).run(tmp_path / name)
    found = records(tmp_path / name)
    losses.append([r["train/loss"] for r in found if "train/loss" in r])
  assert len(losses[0]) == 3
  np.testing.assert_allclose(*losses, rtol=1e-4)


def test_the_command_line(tmp_path, capsys):
  """Three steps of the recipe, all four axes by --set."""
  axes = ("data=1", "fsdp=2", "model=2", "seq=2")
  sets = [*(f"mesh.{x}" for x in axes), "steps=3", "task.schedule=kv_ring"]
  argv = ["--config", "quickstart:smoke", "--workdir", str(tmp_path / "run")]
  assert cli.main([*argv, *(y for x in sets for y in ("--set", x))]) == 0
  assert len(records(tmp_path / "run")) >= 3
  argv[-1] = str(tmp_path / "one")
  sets = ["steps=3", "mesh.data=8"]
  assert cli.main([*argv, *(y for x in sets for y in ("--set", x))]) == 0
  run, one = (
    [r["train/loss"] for r in records(tmp_path / x) if "train/loss" in r]
    for x in ("run", "one")
  )
  np.testing.assert_allclose(run, one, rtol=1e-3)


# --- refusals ---


class Other(Decoder):
  """A model of which nothing is known."""


def model(**changes):
  return {"model": dataclasses.replace(decoder().model, **changes)}


REFUSED = {
  "mesh.seq is 2, and model is a Other: of a Decoder it is known": {
    "model": Other(vocab_size=257, width=16, depth=1, num_heads=4)
  },
  "mesh.seq is 2, and model.attend is moba: only attention": model(
    attend=functools.partial(moba, block=4, top_k=1)
  ),
  "mesh.seq is 2, and model.attend has mask: divided, it has none": model(
    attend=functools.partial(attention, mask=None)
  ),
  "rows of 18 tokens are not a multiple of 4, as task.layout=zigzag needs;"
  " change data.seq_len": {
    "data": dataclasses.replace(decoder().data, seq_len=18)
  },
  "mesh.seq is 2: ulysses gives each of 2 devices some heads, and there are 3"
  " query heads": {
    **model(num_heads=3, num_kv_heads=3, head_dim=4),
    "task": NextToken(schedule="ulysses"),
  },
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_in_one_line(tmp_path, words):
  job = decoder(**{"mesh": Mesh(data=4, seq=2), **REFUSED[words]})
  with pytest.raises(ConfigError) as caught:
    job.run(tmp_path)
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_one_device_needs_no_arrangement():
  job = toy.get_config("all")
  assert sequence.arrangement(job, Mesh(data=8).build()) is None


def test_a_task_without_sequences(tmp_path):
  job = dataclasses.replace(toy.get_config("all"), mesh=Mesh(data=4, seq=2))
  words = "mesh.seq is 2, and task Fragile has no sequence to divide"
  with pytest.raises(ConfigError, match=words):
    job.run(tmp_path)
