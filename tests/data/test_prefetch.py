"""Prefetching: how far ahead, in what order, and gone at the end."""

import subprocess
import sys
import threading
import time

import pytest

from isthmus.data.prefetch import prefetch


def test_runs_ahead_by_its_depth_and_no_further():
  made = []
  batches = prefetch(lambda s: made.append(s) or s, iter(range(99)), depth=3)
  assert next(batches) == (0, 0)
  deadline = time.monotonic() + 5
  while len(made) < 4 and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.05)
  assert made == [0, 1, 2, 3]  # one taken, three ahead
  batches.close()


def test_order_holds_whatever_each_step_takes():
  slow = lambda s: time.sleep(0.01 * (s % 2)) or -s
  expected = [(s, -s) for s in range(9)]
  assert list(prefetch(slow, range(9), depth=4)) == expected


def test_error_comes_after_what_was_made_before_it():
  def make(step):
    if step == 2:
      raise KeyError("gone")
    return step

  seen = []
  with pytest.raises(KeyError, match="gone") as caught:
    for step, _ in prefetch(make, range(5), depth=5):
      seen.append(step)
  assert seen == [0, 1]
  assert caught.value.__notes__ == ["raised by the data loader at step 2"]
  names = [thread.name for thread in threading.enumerate()]
  assert "isthmus-batches" not in names


EXIT = """
import time
from isthmus.data.prefetch import prefetch
batches = prefetch(lambda s: time.sleep(0.01), iter(int, 1), depth=2)
next(batches)
print("end", flush=True)
"""


def test_an_interpreter_exits_with_a_generator_still_open():
  done = subprocess.run(
    [sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=60
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
