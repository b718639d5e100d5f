"""What ends a run from outside: signals, and what its disk and others do."""

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Generator
from types import FrameType

import jax

from isthmus.train import log
from isthmus.train.steps import RunError
from isthmus.train.workdir import WorkdirError

# What is wrong with a disk, and not with the code that writes to it.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}

# A scheduler's two warnings, a key, a terminal that closed.
SIGNALS = {
  getattr(signal, name): spoken
  for name, spoken in (
    ("SIGTERM", "SIGTERM"),
    ("SIGUSR1", "SIGUSR1"),
    ("SIGINT", "Ctrl-C"),
    ("SIGHUP", "SIGHUP"),
  )
  if hasattr(signal, name)
}


class Stop:
  """Whether the run has been asked to stop.

  One process knows at once. Several must stop at one step, which jax's
  preemption service agrees on, so there `asked` stays False and `at` tells.

  Example:
    >>> stop = Stop()
    >>> stop.handle(signal.SIGTERM, None)  # what requests() puts in place
    >>> stop.asked, stop.at(7)
    (True, True)
  """

  def __init__(self) -> None:
    # Not an Event: one signal may interrupt the handling of another, which an
    # Event's lock would then wait for.
    self._asked = False

  @property
  def asked(self) -> bool:
    """Whether this process, being the only one, has been asked to stop."""
    return self._asked and jax.process_count() == 1

  def at(self, step: int) -> bool:
    """Whether to stop after step `step`; every process gets one answer."""
    if jax.process_count() == 1:
      return self._asked
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def handle(self, number: int, frame: FrameType | None) -> None:
    """Notes a signal; a second Ctrl-C aborts, a third doesn't wait for it."""
    if self._asked:
      if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt
      return
    self._asked = True  # before the message: who reads it may press again
    again = ", again aborts" if number == signal.SIGINT else ""
    text = f"{SIGNALS[number]}: stopping after this step{again}\n"
    # Not print: the handler may have interrupted one. A terminal that has
    # closed can't be told.
    with contextlib.suppress(OSError):
      os.write(2, text.encode())
    if jax.process_count() > 1:
      signal.raise_signal(signal.SIGTERM)  # the preemption service's


@contextlib.contextmanager
def requests() -> Generator[Stop, None, None]:
  """Listens for signals while the run is in its block.

  What the process had been told to ignore (`nohup`: SIGHUP) stays ignored.
  With several processes SIGTERM is left to jax's service, and the others are
  passed on as SIGTERM. Outside the main thread nothing is listened to.

  Example:
    >>> with requests() as stop:
    ...   signal.raise_signal(signal.SIGTERM)
    ...   stop.asked
    True
  """
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  mine = set(SIGNALS)
  if jax.process_count() > 1:
    mine.remove(signal.SIGTERM)
  old = {s: signal.getsignal(s) for s in mine}
  old = {s: h for s, h in old.items() if h not in (signal.SIG_IGN, None)}
  for number in old:
    signal.signal(number, stop.handle)
  try:
    yield stop
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def ending() -> Generator[None, None, None]:
  """Inside it, what a run can't help becomes one line, and no traceback.

  Raises:
    RunError: the disk is full or read-only, the folder is gone, or, of several
      processes, another one is.

  Example:
    >>> with ending():
    ...   raise OSError(28, "No space left on device", "loss.png")
    Traceback (most recent call last):
    isthmus.train.steps.RunError: loss.png: No space left on device; ...
  """
  try:
    yield
  except WorkdirError as error:
    raise RunError(str(error)) from error
  except OSError as error:  # a report's, or a data set's that keeps files
    if error.errno not in _DISK:
      raise
    raise RunError(log.refusal(error, error.filename)) from error
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    what = " ".join(str(error).split())[:200]
    raise RunError(
      f"process {jax.process_index()} lost the others: {what}; start all of "
      "them again, they go on from the last checkpoint"
    ) from error
