"""Chosen blocks on the clock: their lines, and that they run and are kept."""

import dataclasses
import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.bench import chosen
from isthmus.attention.bench.chosen import Chosen, digest, drawn, parse
from isthmus.attention.bench.clock import Clock
from isthmus.attention.bench.report import Report
from isthmus.attention.bench.rows import Refusal

pytestmark = pytest.mark.once

ROW = Chosen(
  "drawn",
  "mass",
  0.9,
  131072,
  32,
  8,
  128,
  fwd=60.0,
  choice=12.0,
  kept=0.05,
  mass=0.95,
  head_mass=0.9,
  dense={"isthmus": 270.0, "cudnn": 240.0},
  peak_bytes=2**30,
  digest="ab",
)


def test_a_line_says_what_is_promised():
  line = ROW.line()
  assert line.startswith("mass=0.9, drawn, S131072 H32/8 D128: 60.000 ms, ")
  assert "choice 20.0% (above 15%)" in line and "mass 0.950" in line
  assert line.endswith("4.5x isthmus, 4x cudnn, 3x cudnn is promised")
  short = dataclasses.replace(ROW, length=4096, choice=6.0)
  assert short.wanted is None and "promised" not in short.line()
  assert "choice 10.0%," in short.line()
  assert dataclasses.replace(ROW, heads=16).wanted is None
  assert dataclasses.replace(ROW, length=262144).wanted == 6.0


def measured(**settings):
  settings = {"block": 16, "queries": 8, "peers": ()} | settings
  sources = settings.pop("sources", {"drawn": drawn(2, 1, 16)})
  wanted = settings.pop("wanted", [("mass", 0.5)])
  clock = Clock(1, 1e-4)
  return list(chosen.measure(sources, wanted, [128], clock, **settings))


def test_one_program_serves_all_sources_of_a_shape(monkeypatch, tmp_path):
  built, build = [], chosen.build

  def counted(function, *arguments):
    built.append(arguments[0].shape)
    return build(function, *arguments)

  monkeypatch.setattr(chosen, "build", counted)
  sources = {"one": drawn(2, 1, 16), "other": drawn(2, 1, 16, seed=1)}
  found = measured(sources=sources)
  assert built == 4 * [(1, 128, 2, 16)]  # dense, gauge, pass, choice
  one, other = found
  assert (one.source, other.source) == ("one", "other")
  assert one.digest != other.digest and list(one.dense) == ["isthmus"]
  assert 0 < one.head_mass <= one.mass <= 1 and one.mass != other.mass
  assert 0 < one.kept < 1 and one.fwd > 0 and one.choice > 0
  # And the report keeps them.
  report = Report({"device": "cpu", "copy_bytes_per_second": 1e9}, {})
  report.chosen += found
  report.write(tmp_path / "bench.json")
  again = Report.read(tmp_path / "bench.json")
  assert again.chosen == found
  assert list(again.lines()) == [row.line() for row in found]


def test_what_fails_is_said_and_the_rest_goes_on():
  found = measured(wanted=[("window", 0.5)], peers=["cudnn"])
  refusal, row = found
  assert refusal.who == "cudnn" and "needs an NVIDIA GPU" in refusal.reason
  assert not refusal.failed and row.way == "window"

  def broken(length):
    raise MemoryError("none left")

  found = measured(sources={"broken": broken, "drawn": drawn(2, 1, 16)})
  assert [type(x) for x in found] == [Refusal, Chosen]
  assert found[0].failed and "none left" in str(found[0])


def test_after_its_time_nothing_is_begun():
  found = measured(seconds=-1.0)
  assert [x.who for x in found] == ["dense drawn 128"]
  assert found[0].reason == "there was no time left" and not found[0].failed


def test_the_digest_is_of_the_bytes():
  x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
  y = jnp.asarray(x, jnp.bfloat16)
  want = hashlib.sha256(x.tobytes() + np.asarray(y).tobytes()).hexdigest()
  assert digest(jnp.asarray(x), y) == want


@pytest.mark.parametrize(
  "text, words",
  [
    ("masses", "'masses' is none of window"),
    ("mass=most", "'most', no number"),
    ("mass=0", "lies in"),
  ],
)
def test_what_is_no_way_is_refused(text, words):
  with pytest.raises(ValueError, match=words):
    parse(text, mass=0.9, share=0.1)
  assert parse("top-k", mass=0.9, share=0.1) == ("top-k", 0.1)
