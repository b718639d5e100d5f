"""The table and the JSON."""

import dataclasses
import json

import pytest

from isthmus.attention.bench.case import Case
from isthmus.attention.bench.decode import Decode, Step
from isthmus.attention.bench.report import Report, markdown, table
from isthmus.attention.bench.rows import Refusal, Row
from isthmus.attention.bench.run import Build

pytestmark = pytest.mark.once

CASE = Case("sparse8", 1, 8192, 16, 128)
ROWS = [
  Row("peer", False, CASE, "fwd", 0.5, peak_bytes=3 << 20),
  Row("isthmus mosaic", True, CASE, "bwd", 1.0, note="looks odd"),
  Row("isthmus mosaic", True, CASE, "fwd", 0.25, first_seconds=2.0),
]
MACHINE = {
  "device": "NVIDIA H100 80GB HBM3",
  "platform": "gpu",
  "jax": "0.11.2",
  "backend": "cuda 13000",
  "copy_bytes_per_second": 2.9e12,
}


def _report():
  return Report(
    MACHINE,
    {"quick": False},
    ROWS,
    [Refusal("fa4", "flash_attn isn't installed")],
    [Build(CASE, 0.03, 1.5), Build(CASE, 0.03)],
  )


def test_the_table_says_who_is_faster():
  lines = [line.split() for line in table(_report()).splitlines()]
  lines = [line[2:] for line in lines if line[:1] == ["sparse"]]
  shape = ["B1", "S8192", "H16", "D128"]
  rate = f"{CASE.flops('fwd') / 0.25e-3 / 1e12:.4g}"
  ours = [line for line in lines if line[4:6] == ["fwd", "isthmus"]]
  assert ours == [
    [*shape, "fwd", "isthmus", "mosaic", "0.250", rate, "2.0", "peer", "2.00x"]
  ]
  (peer,) = [line for line in lines if line[5] == "peer"]
  assert peer[6] == "0.500" and peer[8] == "3"


def test_the_json_holds_all_of_it(tmp_path):
  _report().write(tmp_path / "bench.json")
  found = json.loads((tmp_path / "bench.json").read_text())
  assert found["machine"]["device"] == "NVIDIA H100 80GB HBM3"
  assert found["rows"][2]["speed_over"] == {"peer": 2.0}
  assert "speed_over" not in found["rows"][0]
  assert found["rows"][0]["case"]["length"] == 8192
  assert found["mask_builds"][0]["share_of_causal_forward"] == 0.02
  assert found["refusals"][0]["reason"] == "flash_attn isn't installed"
  assert not list(tmp_path.glob("*.part"))


def test_lines_and_hardware_are_said():
  said = "\n".join(_report().lines())
  assert "0.030 ms, 2.0% of the causal forward pass" in said
  assert "no causal forward pass to compare with" in said
  assert "isthmus mosaic, sparse 1/8 B1 S8192 H16 D128 bwd: looks odd" in said
  assert _report().where().startswith("NVIDIA H100 80GB HBM3 (gpu), jax 0.11.2")


def test_what_was_written_is_read_whole(tmp_path):
  report, path = _report(), tmp_path / "bench.json"
  report.decodes.append(Decode(Step(1, 64, 4, 2, 16), 0.5, 1.0))
  report.write(path)
  assert Report.read(path) == report
  for text in ("{}", "[]", "x", '{"machine": {}, "settings": {}, "rows": [1]}'):
    path.write_text(text)
    with pytest.raises(ValueError, match="bench.json is no bench.json"):
      Report.read(path)


def test_the_fastest_is_marked_whoever_it_is():
  first, _, *lines = markdown(_report()).splitlines()
  assert first == "| case | density | shape | pass | isthmus mosaic | peer |"
  rates = {(r.who, r.which): f"{r.tflops:.0f}" for r in ROWS}
  forward = next(line for line in lines if "| fwd |" in line)
  ours, peer = rates["isthmus mosaic", "fwd"], rates["peer", "fwd"]
  assert forward.endswith(f"| fwd | **{ours}** | {peer} |")
  slower = [dataclasses.replace(ROWS[2], ms=1.0), ROWS[0]]
  assert f"| **{peer}** |" in markdown(Report(MACHINE, {}, slower))
