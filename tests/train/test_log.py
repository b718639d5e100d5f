"""Records that survive a kill, the bar where there is no terminal, the plot."""

import json
import math
import shutil

import pytest

from isthmus.train import log
from isthmus.train.workdir import WorkdirError
from tests.train.test_board import boards, scalars


def _write(folder, steps, **kwargs):
  writer = log.Writer(folder, **kwargs)
  for step in steps:
    writer.write(step, {"loss": 1.0 / step})
  writer.close()


def _steps(folder):
  return [r["step"] for r in log.read(folder)]


def test_records(tmp_path):
  writer = log.Writer(tmp_path)
  writer.write(1, {"loss": 0.5, "rate": math.nan})
  writer.write(1, {"loss": math.inf, "hits": 2}, "eval")
  # Each is on its way to the disk at once: a kill loses nothing.
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(x) for x in lines] == [
    {"step": 1, "train/loss": 0.5, "train/rate": None},
    {"step": 1, "eval/loss": None, "eval/hits": 2.0},
  ]
  writer.close()


def test_later_steps_are_forgotten_on_resume(tmp_path):
  _write(tmp_path, [1, 2, 3, 4])
  _write(tmp_path, [3, 4, 5], step=2)
  assert _steps(tmp_path) == [1, 2, 3, 4, 5]
  _write(tmp_path, [1], step=0)
  assert _steps(tmp_path) == [1]


def test_what_is_made_again_is_forgotten(tmp_path):
  writer = log.Writer(tmp_path)
  for step in (1, 2):
    writer.write(step, {"loss": 1.0})
    writer.write(step, {"loss": 2.0}, "eval")
  writer.close()
  log.Writer(tmp_path, step=2, again="eval").close()
  assert [tuple(r) for r in log.read(tmp_path)] == [
    ("step", "train/loss"),
    ("step", "eval/loss"),
    ("step", "train/loss"),
  ]


@pytest.mark.parametrize(
  "cut", ['{"step": 3, "tr', "\x00\x00\x00", "\n\n", "3"]
)
def test_a_line_cut_by_a_kill(tmp_path, cut):
  _write(tmp_path, [1, 2])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(cut)
  assert _steps(tmp_path) == [1, 2]
  _write(tmp_path, [3], step=2)
  assert _steps(tmp_path) == [1, 2, 3]
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert len(lines) == 3


def test_nothing_is_written_by_other_processes(tmp_path):
  _write(tmp_path, [1], enabled=False)
  assert not list(tmp_path.iterdir())
  assert not list(log.read(tmp_path))


def test_a_full_disk_is_said_in_one_line(tmp_path):
  writer = log.Writer(tmp_path)
  writer._file.close()
  writer._file = open("/dev/full", "a")
  with pytest.raises(WorkdirError, match=r"metrics.jsonl: No space left"):
    writer.write(1, {"loss": 1.0})
  writer.close()
  writer = log.Writer(tmp_path)
  writer._board._file = open("/dev/full", "wb")
  with pytest.raises(WorkdirError, match=r"tfevents.*: No space left"):
    writer.write(1, {"loss": 1.0})
  writer.close()


def test_tensorboard_holds_the_same(tmp_path):
  _write(tmp_path, [1, 2])
  _write(tmp_path, [2, 3], step=1)
  assert [scalars(p) for p in boards(tmp_path / "tensorboard")] == [
    [(1, "train/loss", 1.0), (2, "train/loss", 0.5)],
    [(2, "train/loss", 0.5), (3, "train/loss", pytest.approx(1 / 3))],
  ]


@pytest.mark.parametrize(
  "line",
  [b"{", b"\xff\xfe", b"[1]", b'{"train/loss": 1}', b'{"step": "2"}']
  + [b'{"step": 2, "x": "y"}', b'{"step": 2, "x": NaN}', b"[" * 100_000]
  + [b'{"step": 2, "x": 1' + b"0" * 400 + b"}", b'{"step": true}'],
  ids=range(10),
)
def test_a_line_that_is_no_record(tmp_path, capsys, line):
  """It is left out, and said; the file as it was is kept."""
  _write(tmp_path, [1, 2])
  path = tmp_path / "metrics.jsonl"
  first, rest = path.read_bytes().split(b"\n", 1)
  path.write_bytes(spoilt := first + b"\n" + line + b"\n" + rest)
  assert _steps(tmp_path) == [1, 2]
  capsys.readouterr()
  _write(tmp_path, [3], step=2)
  assert _steps(tmp_path) == [1, 2, 3]
  assert "1 of 3 lines are no records" in capsys.readouterr().err
  assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == spoilt
  assert log.plot_losses(tmp_path, "still drawn")


def test_a_deleted_folder_is_noticed(tmp_path):
  folder = tmp_path / "run"
  folder.mkdir()
  writer = log.Writer(folder)
  shutil.rmtree(folder)
  with pytest.raises(WorkdirError, match="deleted or moved"):
    writer.write(1, {"loss": 1.0})
  writer.close()
  with pytest.raises(WorkdirError, match="results.json.*deleted or moved"):
    log.write_results(folder, {})


def test_results(tmp_path, capsys):
  path = tmp_path / "results.json"
  assert log.read_results(tmp_path) == {}
  log.write_results(tmp_path, {"step": 3.0, "x": math.inf})
  assert log.read_results(tmp_path) == {"step": 3.0, "x": math.inf}
  assert capsys.readouterr().err == ""
  for text in (b"{", b"[]", b'{"step": "3"}', b"\xff", b"[" * 100_000):
    path.write_bytes(text)
    assert log.read_results(tmp_path) == {}
    assert "results.json.damaged" in capsys.readouterr().err
    assert (tmp_path / "results.json.damaged").read_bytes() == text


def test_nobody_listens(monkeypatch):
  """A terminal that closed doesn't end a run."""
  closed = open("/dev/full", "w")
  monkeypatch.setattr(log.sys, "stderr", closed)
  log.say("x")
  with pytest.raises(OSError, match="No space left"):
    print("x", file=closed, flush=True)


def test_bar_without_a_terminal(capsys, monkeypatch):
  """A line at the first step, then every ten seconds, and at the end."""
  now = 1000.0
  monkeypatch.setattr(log.time, "monotonic", lambda: now)
  bar = log.Bar("train", steps=100, start=0)
  for step in range(1, 101):
    bar.update(step, f"loss {step}")
    now += 1.0
  bar.close()
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == "train 1/100 loss 1"
  assert lines[1] == "train 11/100 loss 11, 1:29 left"
  assert lines[2] == "train 21/100 loss 21, 1:19 left"
  assert lines[-1] == "train 100/100 loss 100"
  assert len(lines) == 11
  log.Bar("train", steps=2, start=0, enabled=False).update(2, "")
  assert capsys.readouterr().err == ""


def test_bar_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  bar = log.Bar("train", steps=4, start=1)
  bar.update(3, "loss 0.5000")
  bar.close()
  text = capsys.readouterr().err
  assert "3/4" in text and "loss 0.5000" in text


@pytest.mark.parametrize(
  "value, text",
  [
    (12_300_000, "12.3M"),
    (999, "999"),
    (1e3, "1k"),
    (2.5e9, "2.5G"),
    (-4e12, "-4T"),
    (0.0123, "0.0123"),
    (0, "0"),
  ],
)
def test_si(value, text):
  assert log.si(value) == text


def test_plot(tmp_path):
  assert log.plot_losses(tmp_path, "none yet") is None
  writer = log.Writer(tmp_path)
  for step in range(1, 60):
    writer.write(step, {"loss": math.nan if step == 5 else 1 / step})
    if step % 20 == 0:
      writer.write(step, {"loss": 2 / step}, "eval")
  writer.close()
  path = log.plot_losses(tmp_path, "a run")
  assert path == tmp_path / "loss.png"
  assert path.read_bytes().startswith(b"\x89PNG")
