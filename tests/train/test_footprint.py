"""Rows of memory and time: ratios, the table, what there is no room for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from isthmus.attention.bench.clock import Clock
from isthmus.train import footprint
from isthmus.train.footprint import Row

pytestmark = pytest.mark.once

QUICK = Clock(rounds=1, seconds=0.0)
SHAPE = (jax.ShapeDtypeStruct((64,), jnp.float32),)


def _row(way="plain", **figures):
  sizes = {"stack": "mlp", "depth": 2, "width": 8, "volume": (4, 16)}
  return Row(**{**sizes, **figures}, way=way)


def _ones():
  return (jnp.ones(64),)


def test_a_program_has_its_memory_and_time():
  def call(x):
    return jnp.sort(jnp.outer(x, x), axis=0).sum(0)

  row, program = footprint.measure(_row(), call, SHAPE, _ones, clock=QUICK)
  assert row.temp_bytes >= 64 * 64 * 4 and row.ms > 0 and not row.note
  assert program.temp_bytes == row.temp_bytes


@pytest.mark.parametrize(
  "error",
  [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 75.5 GiB"),
    jax.errors.JaxRuntimeError("INTERNAL: Out of memory while trying"),
    MemoryError(),
  ],
)
def test_no_room_is_a_note_and_the_memory_is_told(error):
  def arguments():
    raise error

  call = lambda x: jnp.sort(jnp.outer(x, x), axis=0).sum(0)
  row, program = footprint.measure(_row(), call, SHAPE, arguments, clock=QUICK)
  assert program is None
  assert row.note == "out of memory" and row.ms is None
  assert row.temp_bytes >= 64 * 64 * 4


def test_other_failures_are_not_hidden():
  def arguments():
    raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    footprint.measure(_row(), jnp.sin, SHAPE, arguments, clock=QUICK)


@pytest.mark.parametrize(("after", "told"), [(9, 9), (7, None)])
def test_a_peak_is_told_where_it_rises(monkeypatch, after, told):
  peaks = iter([7, after])
  monkeypatch.setattr(footprint, "_peak", lambda: next(peaks))
  row, _ = footprint.measure(_row(), jnp.sin, SHAPE, _ones, clock=QUICK)
  assert row.device_bytes == told


def test_ratios_are_of_the_same_case():
  rows = [
    _row("remat", temp_bytes=100, ms=4.0),
    _row("plain", temp_bytes=250),
    _row("remat", temp_bytes=1, ms=1.0, depth=3),
    _row("plain", temp_bytes=3, ms=5.0, depth=3),
  ]
  over = lambda row, figure: footprint.ratio(row, rows, "remat", figure)
  assert over(rows[1], "temp_bytes") == 2.5
  assert over(rows[1], "ms") is None  # it didn't run
  assert over(rows[3], "temp_bytes") == 3.0 and over(rows[3], "ms") == 5.0
  assert footprint.ratio(rows[0], rows, "nobody", "ms") is None
  assert over(_row("plain", volume=(8, 16), ms=1.0), "ms") is None


def test_the_table_has_every_row_and_what_is_missing():
  rows = [
    _row("remat", temp_bytes=300 * 2**20, ms=123.4),
    _row("plain", temp_bytes=900 * 2**20, note="out of memory"),
    _row("block", device_bytes=2**20, temp_bytes=2**19, ms=61.7),
  ]
  head, rule, *lines = footprint.table(rows, ["remat"]).splitlines()
  assert {line.count("|") for line in (head, rule, *lines)} == {12}
  assert lines == [
    "| mlp | 2 | 8 | 4x16 | remat | 300 | 1 | 123 | 1 |  |  |",
    "| mlp | 2 | 8 | 4x16 | plain | 900 | 3 |  |  |  | out of memory |",
    "| mlp | 2 | 8 | 4x16 | block | 0.5 | 0.00167 | 61.7 | 0.5 | 1 |  |",
  ]


def test_rows_are_kept_and_drawn(tmp_path):
  rows = [_row(depth=d, temp_bytes=d, ms=1.0 * d) for d in (1, 2)]
  rows += [_row(width=16, temp_bytes=5), _row(stack="conv", note="late")]
  footprint.write(rows, tmp_path / "bench.json", device="x")
  found = json.loads((tmp_path / "bench.json").read_text())
  assert found["device"] == "x"
  assert found["rows"][2] == {
    **dataclasses.asdict(rows[2]),
    "volume": [4, 16],
  }
  footprint.plot(rows, tmp_path / "bench.png", "title")
  assert (tmp_path / "bench.png").stat().st_size > 5000
  assert footprint._longest(rows[:3]) == rows[:2]
  with pytest.raises(ValueError, match="nothing was measured"):
    footprint.plot([], tmp_path / "none.png", "title")
