"""What stops a run: signals, a full disk, a folder or process that is gone."""

import errno
import itertools
import signal
import sys
import threading

import jax
import pytest

from isthmus.train import stop
from isthmus.train.steps import CheckpointError, RunError
from isthmus.train.workdir import WorkdirError


@pytest.mark.parametrize("number", stop.SIGNALS, ids=lambda n: n.name)
def test_each_signal_asks(number, capfd):
  before = signal.getsignal(number)
  with stop.requests() as asked:
    assert not asked.asked and not asked.at(1)
    signal.raise_signal(number)
    assert asked.asked and asked.at(1)
    for other in stop.SIGNALS:  # once more changes nothing, but for Ctrl-C
      if other != signal.SIGINT:
        signal.raise_signal(other)
  assert signal.getsignal(number) == before
  lines = capfd.readouterr().err.splitlines()
  again = ", again aborts" if number == signal.SIGINT else ""
  assert lines == [f"{stop.SIGNALS[number]}: stopping after this step{again}"]


def test_a_second_ctrl_c_aborts_and_a_third_does_not_wait():
  before = signal.getsignal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt), stop.requests():
    signal.raise_signal(signal.SIGTERM)
    try:
      signal.raise_signal(signal.SIGINT)
    finally:
      assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.timeout(30)
def test_a_signal_may_interrupt_the_handling_of_another(capfd):
  """At each of its lines; one that waited for the other would wait forever."""
  for line in itertools.count():
    asked, lines = stop.Stop(), iter(range(line))

    def trace(frame, event, arg, asked=asked, lines=lines):
      if event == "line" and next(lines, None) is None:
        sys.settrace(None)
        asked.handle(signal.SIGTERM, None)
      return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
      asked.handle(signal.SIGHUP, None)
    finally:
      sys.settrace(before)
    assert asked.asked
    if next(lines, None) is not None:
      break  # it has fewer lines
  assert line > 3
  assert "SIGTERM: stopping" in capfd.readouterr().err


def test_what_is_ignored_stays_ignored(monkeypatch):
  """`nohup`."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stop.requests() as asked:
      signal.raise_signal(signal.SIGHUP)
      assert not asked.asked
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_is_no_error(monkeypatch):
  def gone(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(stop.os, "write", gone)
  with stop.requests() as asked:
    signal.raise_signal(signal.SIGHUP)
    assert asked.asked


def test_several_processes_agree_through_jax(monkeypatch):
  """SIGTERM is jax's own; the others are passed on as that."""
  from jax.experimental import multihost_utils

  seen = []
  before = signal.signal(signal.SIGTERM, lambda *_: seen.append("SIGTERM"))
  monkeypatch.setattr(stop.jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    multihost_utils, "reached_preemption_sync_point", lambda step: step == 4
  )
  try:
    with stop.requests() as asked:
      signal.raise_signal(signal.SIGUSR1)
      assert seen == ["SIGTERM"]
      assert not asked.asked  # the others don't know yet
      assert [asked.at(step) for step in (3, 4)] == [False, True]
  finally:
    signal.signal(signal.SIGTERM, before)


def test_another_thread_has_no_signals():
  found = []

  def work():
    with stop.requests() as asked:
      found.append(asked.asked)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [False]


@pytest.mark.parametrize(
  "error, processes, words",
  [
    (OSError(errno.ENOSPC, "No space left", "a.png"), 1, "a.png: No space"),
    (OSError(errno.EROFS, "Read-only file system"), 1, "Read-only"),
    (WorkdirError("it is gone"), 1, "it is gone"),
    (jax.errors.JaxRuntimeError("closed\nby peer"), 2, "closed by peer; start"),
  ],
)
def test_what_a_run_cannot_help(monkeypatch, error, processes, words):
  monkeypatch.setattr(stop.jax, "process_count", lambda: processes)
  with pytest.raises(CheckpointError, match=words) as caught, stop.ending():
    raise error
  assert caught.type is RunError and "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "error",
  [ConnectionError("data"), KeyError("x"), FileNotFoundError(2, "none", "x")]
  + [jax.errors.JaxRuntimeError("out of memory")],
)
def test_other_errors_are_left_alone(error):
  with pytest.raises(type(error)) as caught, stop.ending():
    raise error
  assert caught.value is error
