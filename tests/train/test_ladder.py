"""The ladder: every row there, also without room, time or an end."""

import json
import os
import signal
import threading
import types

import jax
import jax.numpy as jnp
import pytest

from isthmus.attention.bench.clock import Clock
from isthmus.train import footprint, ladder
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


@pytest.fixture
def told(monkeypatch):
  """What is compiled, "c", and timed, "t", in order."""
  done, build, turns = [], footprint.build, Clock.in_turns

  def tell_build(*arguments):
    program = build(*arguments)
    done.append("c")
    return program

  def tell_turns(self, *arguments):
    done.append("t")
    return turns(self, *arguments)

  monkeypatch.setattr(footprint, "build", tell_build)
  monkeypatch.setattr(Clock, "in_turns", tell_turns)
  return done


@pytest.mark.parametrize(
  ("together", "order"), [(1, "ccttt" * 3), (2, "cccctttttt" + "ccttt")]
)
def test_programs_are_compiled_before_any_of_them_is_timed(
  told, tmp_path, together, order
):
  results = _ladder(Sines(1), Sines(2), Sines(3), together=together).run(
    tmp_path
  )
  assert results["rows"] == 6 and "".join(told) == order


def test_programs_are_compiled_side_by_side(tmp_path, monkeypatch):
  """Each waits for another, but those of the first way."""
  monkeypatch.setattr(os, "cpu_count", lambda: 2)
  met = threading.Barrier(2)
  together = lambda way: met.wait(60) if way != WAYS[0] else None
  problems = Sines(1, together), Sines(2, together)
  assert _ladder(*problems).run(tmp_path)["rows"] == 4


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
  results = _ladder(Sines(1), Sines(3), together=1).run(tmp_path)
  assert results["rows"] == 3 and "sines/L1/d1/64/plain/ms" not in results
  text = (tmp_path / "bench.md").read_text()
  assert text.count("out of memory") == 1 and text.count("| sines |") == 4


def test_what_there_is_no_time_for_is_said(tmp_path):
  results = _ladder(Sines(1), Sines(3), limit_s=1e-9).run(tmp_path)
  assert results == {"rows": 0.0}
  assert (tmp_path / "bench.md").read_text().count("not begun after") == 4


def test_what_was_compiled_when_the_time_was_up_has_its_memory(
  tmp_path, monkeypatch
):
  now = [0.0]
  clock = types.SimpleNamespace(monotonic=lambda: now[0])
  monkeypatch.setattr(ladder, "time", clock)

  def compile_long(way):
    now[0] += 9.0 * (way == WAYS[-1])

  problems = Sines(1), Sines(3, compile_long)
  results = _ladder(*problems, limit_s=5.0).run(tmp_path)
  assert results["rows"] == 0 and "sines/L3/d1/64/plain/mib" in results
  assert (tmp_path / "bench.md").read_text().count("not begun after") == 4


def test_a_signal_and_a_failure_leave_the_rows_that_were_measured(tmp_path):
  def stop(way):
    os.kill(os.getpid(), signal.SIGTERM)

  for together, rows in ((1, 2), (2, 0)):
    problems = Sines(1), Sines(3, stop)
    path = tmp_path / f"stopped{together}"
    results = _ladder(*problems, together=together).run(path)
    assert results == {"interrupted": 1, "rows": rows, **results}

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
    ({"together": 0}, "together is 0"),
    ({"bases": ("rematt",)}, "'rematt' is none of the ways remat, plain"),
  ],
)
def test_refused(wrong, message):
  right = {"problems": (Sines(1),), "ways": WAYS, "bases": ()}
  with pytest.raises(ValueError, match=message):
    Ladder(**{**right, **wrong})
