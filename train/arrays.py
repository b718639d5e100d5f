"""Named arrays in a folder, written and read by Orbax v1.

This is the one file that knows Orbax.
"""

import contextlib
import logging
import pathlib
import sys
import threading
import time
from typing import Any

from isthmus.train import leaves
from isthmus.train.leaves import Name

# By Orbax's reckoning, with the time of day, which may jump: a century.
_TIMEOUT = 100 * 365 * 24 * 3600


def write(path: pathlib.Path, tree: dict[str, Any]) -> Any:
  """Starts a write; `.result()` returns when all processes have written.

  Args:
    path: a folder that isn't there; its parent is.
    tree: nested dicts of arrays.

  Example:
    >>> write(pathlib.Path("7").absolute(), {"w": jnp.arange(3.0)}).result()
    >>> read(pathlib.Path("7").absolute(), {("w",): np.zeros(3)})["w"].tolist()
    [0.0, 1.0, 2.0]
  """
  ocp = _orbax()
  context = ocp.Context()
  # If folders made in the background can't be made, threads wait for them for
  # twenty minutes, and so does the interpreter's exit.
  context.asynchronous.create_directories_asynchronously = False
  context.asynchronous.timeout_secs = _TIMEOUT
  # Parameters shrink by 8%, and take three times as long to write and read.
  context.array.saving.use_compression = False
  with context:
    return ocp.save_async(path, tree)


def read(path: pathlib.Path, templates: dict[Name, Any]) -> dict[str, Any]:
  """Reads the arrays that have a template; None leaves one out.

  Example:
    >>> tree = {"w": jnp.arange(3.0), "b": jnp.zeros(2)}
    >>> path = pathlib.Path("7").absolute()
    >>> write(path, tree).result()
    >>> found = read(path, {("w",): np.zeros(3), ("b",): None})
    >>> found["w"].tolist()
    [0.0, 1.0, 2.0]
  """
  ocp = _orbax()
  asked = {n: ocp.PLACEHOLDER if t is None else t for n, t in templates.items()}
  return ocp.load(path, leaves.nest(asked))


def give_up() -> None:
  """Ends the threads of a write that failed.

  One array's error leaves the threads of the others waiting for ever, and the
  interpreter, when it ends, for them.

  Example:
    >>> give_up()  # after a write that failed; none of its threads is left
    >>> [t for t in threading.enumerate() if "Signaling" in type(t).__name__]
    []
  """
  ends = time.monotonic() + 5.0
  while (left := _writing()) and time.monotonic() < ends:
    for thread in left:  # again and again: one that has just begun misses it
      cancel = getattr(thread, "cancel", None)
      if cancel is not None:
        with contextlib.suppress(RuntimeError):  # its loop has just closed
          cancel()
    time.sleep(0.01)


def _writing() -> list[threading.Thread]:
  return [
    t for t in threading.enumerate() if type(t).__name__ == "_SignalingThread"
  ]


def _orbax() -> Any:
  try:
    from orbax.checkpoint import v1
  except ImportError:
    import orbax.checkpoint.experimental.v1 as v1
  # A failed write is raised, once; Orbax's threads would also log it, and the
  # loops they leave would complain, each with a traceback.
  noise = logging.getLogger("absl")
  if _is_news not in noise.filters:
    noise.addFilter(_is_news)
  if getattr(sys.unraisablehook, "__name__", "") != "_unraisable":
    previous = sys.unraisablehook

    def _unraisable(unraisable):
      if str(unraisable.exc_value) != "Event loop is closed":
        previous(unraisable)

    sys.unraisablehook = _unraisable
  return v1


def _is_news(record: logging.LogRecord) -> bool:
  return "_SignalingThread.run() raised an exception" not in str(record.msg)
