"""A run's folder: one run at a time in it, and one set of settings for it."""

import contextlib
import json
import pathlib
from collections.abc import Generator
from typing import Any

from isthmus.train import manifest
from isthmus.train.config import ConfigError, flatten

# Settings that may differ between a run and its resumption: they change where
# and how often, never what is computed at a step.
FREE = ("mesh", "rules", "log_every", "save_every", "keep", "profile", "report")
CONFIG = "config.json"


class WorkdirError(RuntimeError):
  """A folder that can't be used, and what to do about it."""


class BusyError(WorkdirError):
  """A folder that another run is using right now."""


@contextlib.contextmanager
def lock(
  workdir: pathlib.Path, *, wait: float = 0
) -> Generator[None, None, None]:
  """Holds the folder for one run; a second one is refused.

  Args:
    workdir: the folder; made if missing.
    wait: seconds to wait for a run that holds it.

  Raises:
    BusyError: another run holds it.
    WorkdirError: it can't be made or written.

  Example:
    >>> with lock(pathlib.Path("run")), lock(pathlib.Path("run")):
    ...   print("never reached")
    Traceback (most recent call last):
    isthmus.train.workdir.BusyError: run is in use by another run; ...
  """
  import filelock

  try:
    str(workdir).encode()
  except UnicodeEncodeError:  # what writes the checkpoints takes no other
    raise WorkdirError(
      f"{str(workdir)!r} is not UTF-8, or this locale isn't: set PYTHONUTF8=1, "
      "or give another --workdir"
    ) from None
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(workdir / ".lock", timeout=wait)
    held.acquire()
  except filelock.Timeout:
    raise BusyError(
      f"{workdir} is in use by another run; wait for it, or give --workdir"
    ) from None
  except OSError as error:
    raise WorkdirError(f"{workdir}: {error.strerror or error}") from None
  except ValueError as error:  # a zero byte in its name
    raise WorkdirError(f"{str(workdir)!r}: {error}") from None
  try:
    yield
  finally:
    held.release()


def record(
  workdir: pathlib.Path, job: Any, *, source: dict[str, Any], force: bool
) -> None:
  """Writes the resolved settings, or compares them with those already there.

  Args:
    workdir: the run's folder.
    job: the job about to run.
    source: how to build it again: `{"config": ..., "set": [...]}`.
    force: take the new settings even if they differ.

  Raises:
    ConfigError: the folder holds a run with other settings.
    WorkdirError: they can't be written, or those there can't be read.

  Example:
    >>> from isthmus.train.mesh import Mesh
    >>> from isthmus.train.optim.chain import Optimizer
    >>> folder = pathlib.Path()
    >>> record(folder, Optimizer(warmup=10), source={}, force=False)
    >>> record(folder, Optimizer(warmup=20), source={}, force=False)
    Traceback (most recent call last):
    isthmus.train.config.ConfigError: . holds a run with warmup = 10, ...
  """
  path = workdir / CONFIG
  new = flatten(job)
  if path.is_file() and not force:
    old = load(workdir)["resolved"]
    if differ := differing(old, new):
      k = differ[0]
      more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
      was = " ".join(old.get(k, "unset").split())[:200]
      raise ConfigError(
        f"{workdir} holds a run with {k[:200]} = {was}, not "
        f"{new.get(k, 'unset')}{more}; use another --workdir, or --force"
      )
  text = json.dumps({**source, "resolved": new}, indent=1) + "\n"
  try:
    manifest.write_text(path, text)
  except OSError as error:
    raise WorkdirError(f"{path}: {error.strerror or error}") from error


def differing(old: dict[str, str], new: dict[str, str]) -> list[str]:
  """Names of the settings that differ between two runs and may not.

  Example:
    >>> differing({"steps": "8", "keep": "3"}, {"steps": "9", "keep": "4"})
    ['steps']
  """
  return [
    k
    for k in sorted(old.keys() | new.keys())
    if old.get(k) != new.get(k) and k.split(".")[0] not in FREE
  ]


def load(workdir: pathlib.Path) -> dict[str, Any]:
  """What `record` wrote.

  Raises:
    WorkdirError: the folder holds no run, or its config.json is damaged.

  Example:
    >>> from isthmus.train.mesh import Mesh
    >>> source = {"config": "mine.py", "set": ["mesh.fsdp=4"]}
    >>> record(pathlib.Path(), Mesh(fsdp=4), source=source, force=False)
    >>> load(pathlib.Path())["resolved"]["fsdp"]
    '4'
  """
  path = workdir / CONFIG
  try:
    data = json.loads(path.read_bytes().decode())
    if not isinstance(data["resolved"], dict):
      raise ValueError("no settings in it")
    if not all(isinstance(v, str) for v in data["resolved"].values()):
      raise ValueError("settings that are no text")
    given = [data.get("config", ""), *data.get("set", [])]
    if not all(isinstance(v, str) for v in given):
      raise ValueError("a recipe that is no text")
  except FileNotFoundError:
    raise WorkdirError(
      f"{workdir} holds no run: {CONFIG} isn't there"
    ) from None
  except OSError as error:
    raise WorkdirError(f"{path}: {error.strerror or error}") from error
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise WorkdirError(
      f"{path} is damaged ({error}); delete it and give --config again"
    ) from None
  return data
