"""The ladder: every row there, also without room, time or an end."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from isthmus.train import footprint
from isthmus.train.ladder import Ladder

pytestmark = pytest.mark.once

WAYS = ("remat", "plain")


class Sines:
  """A chain of sines; `fail` is called with each way."""

  def __init__(self, depth, fail=None):
    self.depth, self.fail = depth, fail
    self.sizes = dict(stack="sines", depth=depth, width=1, volume=(64,))

  def draw(self, key):
    return (jax.random.normal(key, (64,)),)

  def gradient(self, way):
    if self.fail:
      self.fail(way)

    def call(x):
      for _ in range(self.depth):
        x = jnp.sin(x)
      return x.sum()

    return jax.grad(jax.checkpoint(call) if way == "remat" else call)


def _ladder(*problems, **options):
  settings = {"rounds": 1, "seconds": 0.0, **options}
  return Ladder(problems=problems, ways=WAYS, bases=("remat",), **settings)


def test_every_problem_has_a_row_each_way(tmp_path):
  results = _ladder(Sines(1), Sines(3)).run(tmp_path)
  names = [f"sines/L{d}/d1/64/{w}" for d in (1, 3) for w in WAYS]
  assert set(results) == {"rows"} | {
    f"{name}/{unit}" for name in names for unit in ("mib", "ms")
  }
  assert results["rows"] == 4
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  assert [(row["depth"], row["way"]) for row in rows] == [
    (d, w) for d in (1, 3) for w in WAYS
  ]
  assert (tmp_path / "bench.md").read_text().count("| sines |") == 4
  assert (tmp_path / "bench.png").stat().st_size > 5000


def test_no_room_does_not_end_it(tmp_path, monkeypatch):
  real = footprint.build

  def build(function, *shapes):
    if len(calls := built) == 1:
      calls.append(function)
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much")
    calls.append(function)
    return real(function, *shapes)

  built = []
  monkeypatch.setattr(footprint, "build", build)
  results = _ladder(Sines(1), Sines(3)).run(tmp_path)
  assert results["rows"] == 3 and "sines/L1/d1/64/plain/ms" not in results
  text = (tmp_path / "bench.md").read_text()
  assert text.count("out of memory") == 1 and text.count("| sines |") == 4


def test_what_there_is_no_time_for_is_said(tmp_path):
  results = _ladder(Sines(1), Sines(3), limit_s=1e-9).run(tmp_path)
  assert results == {"rows": 0.0}
  assert (tmp_path / "bench.md").read_text().count("not begun after") == 4


def test_a_signal_and_a_failure_leave_the_rows_that_were_measured(tmp_path):
  def stop(way):
    if way == "remat":
      os.kill(os.getpid(), signal.SIGTERM)

  results = _ladder(Sines(1), Sines(3, stop)).run(tmp_path / "stopped")
  assert results["interrupted"] == 1 and results["rows"] == 3

  def fail(way):
    raise RuntimeError("broken")

  with pytest.raises(RuntimeError, match="broken"):
    _ladder(Sines(1), Sines(3, fail)).run(tmp_path / "failed")
  assert (tmp_path / "failed/bench.md").read_text().count("| sines |") == 2
  rows = json.loads((tmp_path / "failed/bench.json").read_text())["rows"]
  assert len(rows) == 2


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"rounds": 0}, "rounds is 0"),
    ({"limit_s": 0.0}, "limit_s 0.0"),
    ({"seconds": -1.0}, "seconds is -1.0"),
    ({"problems": ()}, "0 problems"),
    ({"bases": ("rematt",)}, "'rematt' is none of the ways remat, plain"),
  ],
)
def test_refused(wrong, message):
  right = {"problems": (Sines(1),), "ways": WAYS, "bases": ()}
  with pytest.raises(ValueError, match=message):
    Ladder(**{**right, **wrong})
