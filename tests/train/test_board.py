"""TensorBoard's files: whole, in order, and an error where it happens."""

import pytest

from isthmus.train import board


def boards(folder):
  """A folder's files in the order that TensorBoard reads them."""
  return sorted(folder.iterdir())


def events(path):
  """The events of a file; their checksums are looked at."""
  from tensorboardX.proto import event_pb2
  from tensorboardX.record_writer import masked_crc32c

  data, found = path.read_bytes(), []
  while data:
    size = int.from_bytes(data[:8], "little")
    body = data[12 : 12 + size]
    for piece, end in ((data[:8], 12), (body, 16 + size)):
      assert int.from_bytes(data[end - 4 : end], "little") == masked_crc32c(
        piece
      )
    found.append(event_pb2.Event.FromString(body))
    data = data[16 + size :]
  assert found[0].file_version == "brain.Event:2"
  return found


def scalars(path):
  return [
    (e.step, v.tag, v.simple_value)
    for e in events(path)
    for v in e.summary.value
  ]


def test_scalars_are_there_at_once(tmp_path):
  writer = board.Board(tmp_path / "new")
  writer.write(3, {"a": 1.5, "b": float("nan")})
  writer.write(4, {"a": 2.5})
  (path,) = boards(tmp_path / "new")
  found = scalars(path)
  assert [x[:2] for x in found] == [(3, "a"), (3, "b"), (4, "a")]
  assert [found[0][2], found[2][2]] == [1.5, 2.5] and found[1][2] != 1
  writer.close()


def test_a_resumed_run_hides_later_steps(tmp_path):
  board.Board(tmp_path, purge=7).close()
  (path,) = boards(tmp_path)
  starts = [e for e in events(path) if e.HasField("session_log")]
  assert [(e.step, e.session_log.status) for e in starts] == [(7, 1)]


def test_no_file_is_written_over_and_none_comes_before_an_older(
  tmp_path, monkeypatch
):
  """Two in one second, and two when the clock was turned back."""
  clock = iter([1e9, 1e9 + 0.5, 9e8, 0.0, 2e9])
  monkeypatch.setattr(board.time, "time", lambda: next(clock))
  for step in range(5):
    writer = board.Board(tmp_path)
    writer.write(step, {"a": float(step)})
    writer.close()
  found = [scalars(p) for p in boards(tmp_path)]
  assert found == [[(step, "a", step)] for step in range(5)]


def test_a_clock_that_jumps_leaves_the_order(tmp_path, monkeypatch):
  writer = board.Board(tmp_path)
  for step, now in enumerate([5e9, 0.0, -3.0, 2e9]):
    monkeypatch.setattr(board.time, "time", lambda now=now: now)
    writer.write(step, {"a": 0.0})
  writer.close()
  times = [e.wall_time for e in events(boards(tmp_path)[0])]
  assert times == sorted(times) and times[-1] - times[0] < 60


def test_a_full_disk_is_raised(tmp_path):
  writer = board.Board(tmp_path)
  writer.close()
  writer._file = open("/dev/full", "wb")
  with pytest.raises(OSError, match="No space left"):
    writer.write(1, {"a": 1.0})
