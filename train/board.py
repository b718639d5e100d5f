"""TensorBoard files, written at once: an error is raised where it happens.

Writers with a thread of their own lose what is queued when the thread dies of
a full disk, and then wait for it without end.
"""

import pathlib
import re
import socket
import struct
import time
from typing import Any

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class Board:
  """One file of scalars, never one that is there already.

  TensorBoard reads a folder's files by the number in their names, which is
  the time. Where the clock was turned back, or two runs began in one second,
  the number is the last file's plus one.

  Args:
    folder: where the file goes; made if missing.
    purge: TensorBoard forgets what older files say of this step and later.

  Raises:
    ImportError: tensorboardX, whose messages these are, isn't installed.
    OSError: the file can't be written, here and in `write`.

  Example:
    >>> board = Board(pathlib.Path("tensorboard"))
    >>> board.write(10, {"loss": 0.5})
    >>> board.close()
    >>> board.path.name.startswith("events.out.tfevents")
    True
  """

  def __init__(self, folder: pathlib.Path, *, purge: int | None = None):
    from tensorboardX.proto import event_pb2

    proto: Any = event_pb2  # its messages are made at run time
    self._event = proto.Event
    self._time, self._tick = time.time(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    found = (_NAME.match(p.name) for p in folder.iterdir())
    last = max((int(m[1]) for m in found if m), default=0)
    number = max(int(self._time), last + 1)
    name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}"
    self.path = folder / name
    self._file = self.path.open("xb")
    self._put(self._event(file_version="brain.Event:2"))
    if purge is not None:
      start = proto.SessionLog(status=proto.SessionLog.START)
      self._put(self._event(step=purge, session_log=start))
    self._file.flush()

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """The scalars of a step, on their way to the disk on return."""
    event = self._event(step=step)
    for tag, value in scalars.items():
      event.summary.value.add(tag=tag, simple_value=value)
    self._put(event)
    self._file.flush()

  def close(self) -> None:
    """Closes the file; what was written is in it already."""
    self._file.close()

  def _put(self, event) -> None:
    """A TFRecord: length, its checksum, data, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    # The clock may jump while a run lasts; the order of its events doesn't.
    event.wall_time = self._time + time.monotonic() - self._tick
    data = event.SerializeToString()
    size = struct.pack("<Q", len(data))
    self._file.write(
      b"".join(
        (
          size,
          struct.pack("<I", masked_crc32c(size)),
          data,
          struct.pack("<I", masked_crc32c(data)),
        )
      )
    )
