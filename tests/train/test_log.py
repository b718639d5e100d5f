"""Records that survive a kill, the bar where there is no terminal, the plot."""

import json
import math

import pytest

from isthmus.train import log
from isthmus.train.workdir import WorkdirError


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


def test_tensorboard_holds_the_same(tmp_path):
  from tensorboardX.proto import event_pb2
  from tensorboardX.record_writer import masked_crc32c  # noqa: F401

  _write(tmp_path, [1, 2])
  files = list((tmp_path / "tensorboard").iterdir())
  assert len(files) == 1
  data, found = files[0].read_bytes(), []
  while data:
    size = int.from_bytes(data[:8], "little")
    event = event_pb2.Event.FromString(data[12 : 12 + size])
    found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    data = data[16 + size :]
  assert found == [(1, "train/loss", 1.0), (2, "train/loss", 0.5)]


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
