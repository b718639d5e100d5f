"""The tuning command, with a clock and a compiler that are made up."""

import dataclasses
import json

import pytest

from isthmus.pallas import table, tune
from isthmus.pallas.compat import has_mosaic

if not has_mosaic():
  pytest.skip("needs jax 0.11", allow_module_level=True)

from isthmus.pallas.flash.configs import allowed, guess, parse
from isthmus.pallas.flash.mosaic_backward import BackwardConfig

pytestmark = pytest.mark.once


def fake_build(candidate):
  """128 tokens of keys above 128 columns: more memory than there is."""
  block = dataclasses.astuple(candidate.config)[0]
  if candidate.width > 128 and block == 128:
    raise ValueError(f"{candidate} needs too much shared memory\nand more")
  return lambda: candidate


def fake_timer(call):
  """One stage is the fastest."""
  candidate = call()
  return candidate.config.stages + candidate.width / 1000


def test_candidates_begin_with_the_rule_of_thumb_and_are_allowed():
  found = tune.candidates((64, 256))
  assert len(found) == len(set(found))
  for width in (64, 256):
    for which in ("forward", "queries", "keys"):
      mine = [c for c in found if (c.width, c.which) == (width, which)]
      assert mine[0].config == getattr(guess(width), which)
      for candidate in mine:
        for name, value in dataclasses.asdict(candidate.config).items():
          assert value in allowed(width)[name]
  assert {c.config for c in found if c.which == "queries"} == {
    BackwardConfig(block, stages) for block in (64, 128) for stages in (1, 2, 4)
  }
  groups = {(c.width, c.config.groups) for c in found if c.which == "forward"}
  assert groups == {(64, 2), (64, 3), (256, 2)}


def test_the_fastest_is_found_and_failures_are_recorded():
  told = []
  found = tune.candidates((64, 256))
  rows = tune.sweep(found, fake_timer, fake_build, told.append)
  assert [row.candidate for row in rows] == found and told == rows
  skipped = [row for row in rows if row.skipped]
  assert {row.candidate.width for row in skipped} == {256}
  assert all(row.ms is None for row in skipped)
  assert skipped[0].skipped.endswith("needs too much shared memory")
  best = tune.best(rows)
  assert best["64"]["keys"]["stages"] == 1
  assert best["64"]["forward"]["stages"] == 2
  assert best["256"]["keys"] == {"block": 64, "stages": 1}
  for width, entry in best.items():
    parse(entry, int(width), width)


def test_a_margin_keeps_the_rule_of_thumb():
  found = [c for c in tune.candidates((64,)) if c.which == "keys"]
  first, rest = found[0], found[1:]

  def winner(ms):
    rows = [tune.Row(c, ms=2.0) for c in rest]
    rows[0] = dataclasses.replace(rows[0], ms=ms)
    return tune.best([tune.Row(first, ms=1.0), *rows])["64"]["keys"]

  assert winner(0.995) == dataclasses.asdict(first.config)
  assert winner(0.985) == dataclasses.asdict(rest[0].config)


def test_a_width_without_a_kernel_has_no_entry():
  rows = tune.sweep(tune.candidates((64, 128)), fake_timer, fake_build)
  rows = [
    dataclasses.replace(row, ms=None, skipped="no")
    if (row.candidate.width, row.candidate.which) == (64, "queries")
    else row
    for row in rows
  ]
  assert list(tune.best(rows)) == ["128"]


def test_a_timer_that_fails_skips_its_candidate_alone():
  def timer(call):
    if call().config.stages == 4:
      raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")
    return 1.0

  rows = tune.sweep(tune.candidates((64,)), timer, fake_build)
  reasons = {row.candidate.config.stages: row.skipped for row in rows}
  assert reasons == {1: None, 2: None, 4: "CUDA_ERROR_LAUNCH_FAILED"}


def test_the_command_writes_a_table_that_is_read_back(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(tune, "refuse", lambda: None)
  monkeypatch.setattr(tune, "build", fake_build)
  monkeypatch.setattr(tune.Timer, "__call__", lambda _, call: fake_timer(call))
  monkeypatch.setattr(table, "device_kind", lambda: "Abacus 2")
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
  file = table.place(table.cached(), "Abacus 2", "flash")
  assert tune.main(["flash", "--out", str(file)]) == 0
  said = capsys.readouterr().out
  assert f"wrote {file}" in said
  assert "256 keys 64, 1: 1.2560 ms" in said
  assert "256 keys 128, 1: 256 keys 128, 1 needs too much shared mem" in said
  found = json.loads(file.read_text())
  assert found["device"] == "Abacus 2"
  assert found["command"] == f"python -m isthmus.pallas.tune flash --out {file}"
  assert len(found["times"]) == len(tune.candidates(tune.WIDTHS))
  assert all(("ms" in row) != ("skipped" in row) for row in found["times"])
  assert table.find("Abacus 2", "flash")[0] == (file, found["best"])
  assert list(file.parent.iterdir()) == [file]


def test_quick_and_a_width_that_fails(tmp_path, monkeypatch, capsys):
  def build(candidate):
    if candidate.width == 128 and candidate.which == "forward":
      raise ValueError("no registers")
    return fake_build(candidate)

  rounds = []

  def timed(self, call):
    rounds.append(self.rounds)
    return fake_timer(call)

  monkeypatch.setattr(tune, "refuse", lambda: None)
  monkeypatch.setattr(tune, "build", build)
  monkeypatch.setattr(tune.Timer, "__call__", timed)
  file = tmp_path / "new" / "flash.json"
  assert tune.main(["flash", "--quick", "--out", str(file)]) == 1
  assert "no entry for width 128: " in capsys.readouterr().out
  assert list(json.loads(file.read_text())["best"]) == ["64"]
  assert set(rounds) == {3}


def test_without_a_gpu_one_line_and_status_2(capsys, tmp_path):
  file = tmp_path / "flash.json"
  with pytest.raises(SystemExit) as caught:
    tune.main(["flash", "--out", str(file)])
  said = capsys.readouterr().err
  assert caught.value.code == 2 and not file.exists()
  assert said.count("\n") == 1
  assert "needs an NVIDIA Hopper GPU, and the platform is cpu" in said


def test_an_op_that_is_not_there_is_one_line(capsys):
  with pytest.raises(SystemExit) as caught:
    tune.main(["flush"])
  said = capsys.readouterr().err
  assert caught.value.code == 2 and said.count("\n") == 1 and "flush" in said


def test_timer_takes_the_median(monkeypatch):
  ticks = iter([0.0, 1.0, 10.0, 12.0, 20.0, 29.0])
  monkeypatch.setattr(tune.time, "perf_counter", lambda: next(ticks))
  calls = []
  timer = tune.Timer(rounds=3, calls=4)
  assert timer(lambda: calls.append(1)) == 1e3 * 2 / 4
  assert len(calls) == 1 + 3 * 4


@pytest.mark.gpu
def test_a_candidate_is_built_and_timed_on_the_gpu():
  for candidate in tune.candidates((128,)):
    if candidate.config == getattr(guess(128), candidate.which):
      assert 0 < tune.Timer(rounds=1)(tune.build(candidate)) < 100
