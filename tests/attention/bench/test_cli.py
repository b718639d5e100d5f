"""The command from end to end, at sizes for a CPU."""

import json

import pytest

from isthmus.attention.bench import cli
from isthmus.attention.bench.case import SPARSE, must

pytestmark = pytest.mark.once

SMALL = [
  *("--lengths", "256", "--dims", "16", "--hidden", "32", "--tokens", "256"),
  "--quick",
]


def test_a_run_leaves_table_json_and_plot(tmp_path, capsys):
  out = tmp_path / "found"
  command = [*SMALL, "--cases", "causal,sparse8", "--passes", "fwd"]
  assert cli.main([*command, "--peers", "xla,cudnn", "--out", str(out)]) == 0
  said = capsys.readouterr().out
  assert said.startswith("cpu (cpu), jax ")
  assert "no GPU here: these times say nothing about the GPU kernels" in said
  assert said.count("not measured: cudnn: it needs an NVIDIA GPU") == 1
  assert "mask build, sparse 1/8 B1 S256 H2 D16: " in said
  assert "% of copying's rate" in said
  found = json.loads((out / "bench.json").read_text())
  rows = {r["case"]["mask"]: r for r in found["rows"] if r["ours"]}
  assert set(rows) == {"causal", "sparse8"}
  assert all(list(r["speed_over"]) == ["xla"] for r in rows.values())
  assert found["mask_builds"][0]["share_of_causal_forward"] > 0
  assert found["decode"] and found["machine"]["platform"] == "cpu"
  assert (out / "bench.png").stat().st_size > 1000
  (out / "bench.png").unlink()
  assert cli.main(["--show", str(out / "bench.json")]) == 0
  shown = capsys.readouterr().out
  assert shown.partition("\n\n")[2].startswith(said.partition("\n\n")[2][:400])
  assert "| causal | 0.500 | B1 S256 H2 D16 | fwd |" in shown
  assert (out / "bench.png").stat().st_size > 1000


def test_chosen_blocks_alone(tmp_path, capsys):
  command = ["--chosen", "window=0.25", "--lengths", "256", "--heads", "2"]
  command += ["--kv-heads", "1", "--dims", "16", "--quick"]
  assert cli.main([*command, "--out", str(tmp_path)]) == 0
  said = capsys.readouterr().out
  assert "window=0.25, drawn, S256 H2/1 D16: " in said
  assert "not measured: cudnn: it needs an NVIDIA GPU" in said
  found = json.loads((tmp_path / "bench.json").read_text())
  assert found["rows"] == found["decode"] == []
  (row,) = found["chosen"]
  assert row["way"] == "window" and row["speed_over"].keys() == {"isthmus"}
  assert "**window=0.25**" in (tmp_path / "chosen.md").read_text()
  (tmp_path / "chosen.png").unlink()
  assert cli.main(["--show", str(tmp_path / "bench.json")]) == 0
  assert "window=0.25, drawn" in capsys.readouterr().out
  assert (tmp_path / "chosen.png").stat().st_size > 1000


def test_an_implementation_that_refuses_fails_the_run(capsys):
  """And those that run beside it are shown."""
  command = [*SMALL, "--cases", "causal", "--passes", "fwd", "--no-decode"]
  assert cli.main([*command, "--impls", "cudnn"]) == 1
  said = capsys.readouterr().out
  assert "not measured: isthmus cudnn, causal B1 S256 H2 D16 fwd: " in said


@pytest.mark.parametrize(
  "option, said",
  [
    ("--cases=sparse4", "case 'sparse4'; there are dense, causal"),
    ("--passes=backward", "pass 'backward'; there are fwd, bwd, fwd+bwd"),
    ("--peers=fa3", "peer 'fa3'; there are cudnn, "),
    ("--dims=48", "2048 channels don't split into heads of 48"),
    ("--impls=mosaik", "mosaik"),
    ("--show=nothing.json", "nothing.json"),
    ("--chosen=best", "way 'best' is none of window, top-k"),
    ("--chosen=mass=2", "the level of mass is 2.0"),
  ],
)
def test_what_is_not_there_is_one_line(option, said, capsys):
  with pytest.raises(SystemExit) as error:
    cli.main([option])
  assert error.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert said in line


def test_must_can_be_narrowed():
  def cases(*options):
    return cli._cases(cli._parser().parse_args(["--must", *options]))

  assert cases() == must()
  assert {c.mask for c in cases("--sparse")} == set(SPARSE)
  assert {c.mask for c in cases("--cases", "causal")} == {"causal"}
