"""Work that is done ahead by a thread, in order, and never left behind."""

import atexit
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any


def prefetch(
  make: Callable[[int], Any], steps: Iterable[int], *, depth: int
) -> Generator[tuple[int, Any], None, None]:
  """(step, make(step)) in order, up to `depth` of them made ahead.

  The thread starts with the first `next` and is gone when the generator is
  closed, exhausted or collected, or when the interpreter exits.

  Args:
    make: called in the thread, one step after the other.
    steps: may be without end.
    depth: results that wait to be taken, the one in the making counted.

  Raises:
    whatever make raised, with a note that names the step.

  Example:
    >>> list(prefetch(lambda step: step**2, range(3), depth=2))
    [(0, 0), (1, 1), (2, 4)]
  """
  done: queue.SimpleQueue = queue.SimpleQueue()
  slots, stopped = threading.Semaphore(depth), threading.Event()

  def produce():
    for step in steps:
      slots.acquire()
      if stopped.is_set():
        return
      try:
        done.put((step, make(step), None))
      except BaseException as error:
        error.add_note(f"raised by the data loader at step {step}")
        done.put((step, None, error))
        return
    done.put(None)

  thread = threading.Thread(target=produce, name="isthmus-batches", daemon=True)

  def stop():
    stopped.set()
    slots.release()
    thread.join()

  thread.start()
  # A daemon thread still inside jax at interpreter exit would abort it.
  atexit.register(stop)
  try:
    while (item := done.get()) is not None:
      step, value, error = item
      if error is not None:
        raise error
      slots.release()
      yield step, value
  finally:
    # Where atexit has stopped the thread, this runs in the last moments of the
    # interpreter, when the modules that stopping needs may be empty.
    if not stopped.is_set():
      atexit.unregister(stop)
      stop()
