"""The ablation: its schemes, when a run has diverged, what is told of runs."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from isthmus.train import log
from isthmus.train.config import load
from isthmus.train.loop import NonFiniteError
from isthmus.train.mesh import Mesh
from isthmus.train.recipes import adam8bit
from isthmus.train.study import Study
from tests.train.recipes.suite import OneDevice

pytestmark = pytest.mark.once


def trials(**settings):
  kwargs = {"rates": (0.1,), "sizes": dict(width=64, depth=1, num_heads=2)}
  return adam8bit.grid(**(kwargs | settings))


def test_schemes_differ_by_one_thing():
  """Scales of a kernel, the codes of the table, the kind of map, by scheme."""
  found = {}
  for case, fit in trials().items():
    params = jax.eval_shape(
      fit.model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
    )["params"]
    state = jax.eval_shape(fit.transformation().init, params)
    scheme = case.split("/")[0]
    stable = scheme in ("stable", "root", "adam32-stable")
    assert ("embed_norm" in params) == stable
    if case.startswith("adam32"):
      continue
    moments = state[1].moments
    up = moments["nu"].absmax["stack"]["block_00"]["mlp"]["up"]["kernel"]
    table = moments["mu"].codes["embed"]["embedding"].dtype
    kinds = fit.optimizer.scale.keywords
    found[scheme] = (
      up.size,
      table == jnp.uint8,
      kinds.get("first", "dynamic"),
      kinds["second"],
    )
  assert found == {
    "linear": (1, True, "linear", "linear"),
    "dynamic": (1, True, "dynamic", "plain"),
    "blocks": (6, True, "dynamic", "plain"),  # 64 x 192 by 2048
    "stable": (6, False, "dynamic", "plain"),
    "root": (6, False, "dynamic", "sqrt"),
  }


def test_full_sizes():
  job = load("adam8bit:ablation")
  fits = job.runs().values()
  assert len(fits) == 3 * 3 * len(adam8bit.SCHEMES)
  for fit in (load("adam8bit"), next(iter(fits))):
    assert fit.model.param_count() >= 25e6
    assert fit.steps * fit.batch_size * fit.data.seq_len >= 30e6


@pytest.mark.parametrize(
  "losses, diverged",
  [
    ((2.0, 1.5, 1.4), 0),
    ((2.0, 1.5, 1.9), 0),
    ((2.0, 1.5, 2.1), 1),  # above its own best
    ((5.5, 4.0, 3.2), 1),  # knows less than frequencies
    ((5.5, 4.0, 3.1), 0),
  ],
)
def test_when_a_run_has_diverged(tmp_path, losses, diverged):
  with contextlib.closing(log.Writer(tmp_path)) as writer:
    for step, loss in enumerate(losses, 1):
      writer.write(step, {"loss": loss}, "eval")
  (job,) = trials(schemes=("adam32",)).values()
  found = adam8bit.judge(job, tmp_path, None, {"eval/loss": losses[-1]})
  assert found == {"diverged": diverged}


def test_a_run_without_numbers_is_a_result(tmp_path, monkeypatch):
  """And is not run again."""
  calls = []

  def fit(job, path):
    calls.append(path)
    raise NonFiniteError("loss is nan at step 3")

  monkeypatch.setattr("isthmus.train.loop.fit", fit)
  study = Study(
    grid=lambda: trials(schemes=("linear",)), seeds=1, report=adam8bit.tell
  )
  for _ in range(2):
    results = study.run(tmp_path)
  assert len(calls) == 1
  assert results == {"runs": 1.0, "linear/lr0.1/diverged": 1.0}
  assert "| linear | 1/1 |" in (tmp_path / "report.md").read_text()


def test_what_is_told(tmp_path):
  ended = [{"eval/loss": x, "diverged": 0.0} for x in (1.0, 1.2, 1.1)]
  lost = [{"diverged": 1.0}, {"eval/loss": 9.0, "diverged": 1.0}]
  results = {
    "adam32/lr0.01": ended,
    "adam32/lr0.1": [*ended[:2], lost[0]],
    "linear/lr0.01": [ended[0], *lost],
    "linear/lr0.1": [*lost, lost[0]],
  }
  study = Study(grid=dict, report=adam8bit.tell)
  figures = adam8bit.tell(study, tmp_path, results)
  assert figures["adam32/lr0.01/loss"] == pytest.approx(1.1)
  assert figures["linear/lr0.01/diverged"] == pytest.approx(2 / 3)
  assert "linear/lr0.1/loss" not in figures
  rows = (tmp_path / "report.md").read_text().splitlines()
  assert "| adam32 | 0/3, 1.100 [0.852, 1.348] | 1/3, 1.100 [-0.171" in rows[-2]
  assert rows[-1] == "| linear | 2/3, 1.000 | 3/3 |"
  first = json.loads((tmp_path / "ablation.json").read_text())[0]
  assert first["losses"] == [1.0, 1.2, 1.1] and first["learning_rate"] == 0.01
  assert (tmp_path / "ablation.png").stat().st_size > 1000


def test_a_small_ablation_is_run(tmp_path):
  results = load("adam8bit:ablation_smoke", ["seeds=1"]).run(tmp_path)
  assert results["runs"] == 2
  for scheme in ("adam32", "blocks"):
    # After two steps it knows less than frequencies.
    assert results[f"{scheme}/lr0.01/diverged"] == 1.0
    (run,) = json.loads((tmp_path / "study.json").read_text())[
      f"{scheme}/lr0.01"
    ]
    assert adam8bit.FREQUENCIES < run["eval/loss"] < 7
  assert len(json.loads((tmp_path / "ablation.json").read_text())) == 2


@pytest.mark.slow
def test_split_states_train_as_whole_ones(tmp_path):
  """On two by four devices, kernels and what belongs to them split in two."""
  job = load("adam8bit:smoke", ["save_every=0", "eval_every=0"])
  devices = jax.devices()
  assert len(devices) == 8
  ends = []
  for name, mesh in (("one", OneDevice()), ("many", Mesh(data=4, fsdp=2))):
    fit = dataclasses.replace(job, mesh=mesh)
    ends.append(fit.run(tmp_path / name)["train/loss"])
  assert ends[1] == pytest.approx(ends[0], rel=1e-3)
