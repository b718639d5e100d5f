"""Checkpoints: asynchronous, atomic, checked on restore, for any mesh.

Orbax v1 writes and reads the arrays; this is the one file that knows it. What
it adds: a step counts once its SHA-256 manifest is on the disk, a restore
checks every file against it and walks back to the last good step, and nothing
is cast, padded or left out silently.

On disk, in the checkpointer's folder (shared by all processes):

    12/                  a finished step: Orbax's files and MANIFEST.json
    15.pending/          being written; renamed to 15 when all of it is on disk
    9.deleted, 9.replaced   on their way out
"""

import json
import logging
import operator
import pathlib
import re
import shutil
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from isthmus.train import leaves, log, manifest
from isthmus.train.leaves import Name
from isthmus.train.manifest import DamageError

State = Any
_LEFTOVER = re.compile(
  r"\d+(\.(pending|replaced|deleted))?(\.orbax-checkpoint-tmp.*)?"
)


class CheckpointError(RuntimeError):
  """A checkpoint that can't be written, found or trusted, and what to do."""


class Checkpointer:
  """Saves and restores the states of a run in one folder.

  With several processes, each of them calls every method, in the same order,
  on a folder they share. One checkpointer at a time writes to a folder.

  Args:
    directory: the folder; made if missing. What a killed save left in it is
      removed.
    keep: newest steps to keep.
    keep_every: also keep the steps that are multiples of this.

  Example:
    >>> with Checkpointer(workdir / "ckpt") as ckpt:
    ...   restored = ckpt.restore(target)
    ...   step, state = (0, init()) if restored is None else restored
    ...   ckpt.save(step, state)
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep: int = 3,
    keep_every: int | None = None,
  ):
    if keep < 1:
      raise ValueError(f"keep is {keep}; it is at least 1")
    if keep_every is not None and keep_every < 1:
      raise ValueError(f"keep_every is {keep_every}; it is at least 1, or None")
    self.directory = pathlib.Path(directory).absolute()
    self.keep, self.keep_every = keep, keep_every
    self._thread: threading.Thread | None = None
    self._step: int | None = None
    self._error: BaseException | None = None
    self._damaged: set[int] = set()
    if jax.process_index() == 0:
      try:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._tidy()
      except OSError as error:
        raise CheckpointError(
          f"checkpoints can't be kept in {self.directory}: "
          f"{error.strerror or error}; give another folder"
        ) from error

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, kind, value, traceback) -> None:
    if kind is None:
      self.close()
    elif self._thread is not None:
      # An error is on its way: finish the write, but don't talk over it, and
      # don't wait for processes that may not have had that error.
      self._thread.join()
      self._thread = None
      if self._error is not None:
        log.say(f"warning: {self._failure(self._error)}")

  def save(
    self,
    step: int,
    state: State,
    *,
    extra: dict[str, Any] | None = None,
    wait: bool = False,
  ) -> None:
    """Saves a state; returns when it is copied, before it is written.

    The caller may donate or overwrite the state right after. A save that is
    still being written is waited for. A step that exists is replaced: the old
    folder, damaged or not, is deleted once the new one is complete.

    Args:
      step: its number, at least 0.
      state: any tree of arrays, typed keys and numbers.
      extra: JSON values to keep beside it; see `extra`.
      wait: return when it is on the disk.

    Raises:
      CheckpointError: this save, or the one before it, failed.
      ValueError: a leaf is no array, or the step is negative.
    """
    step = operator.index(step)
    if step < 0:
      raise ValueError(f"step is {step}; it is at least 0")
    extra = json.loads(json.dumps(extra))
    named = leaves.flatten(state)
    held = [{"path": n, **leaves.describe(x)} for n, x in named.items()]
    stored = {n: leaves.store(n, x) for n, x in named.items()}
    stored = {n: x for n, x in stored.items() if x.size}  # Orbax refuses others
    if not stored:
      raise ValueError("the state holds no arrays; there is nothing to save")
    self.wait()
    pending = self.directory / f"{step}.pending"
    self._step = step
    try:
      if jax.process_index() == 0:
        _remove(pending)
      response = _write(pending, leaves.nest(stored))
    except Exception as error:
      raise CheckpointError(self._failure(error)) from error

    def finish() -> None:
      try:
        response.result()  # every process has written
        if jax.process_index() == 0:
          manifest.write(pending, step=step, leaves=held, extra=extra)
          self._commit(step)
          self._prune(step)
      except Exception as error:
        self._error = error
        if jax.process_index() == 0:
          shutil.rmtree(pending, ignore_errors=True)

    self._thread = threading.Thread(target=finish, name=f"checkpoint {step}")
    self._thread.start()
    if wait:
      self.wait()

  def wait(self) -> None:
    """Returns when nothing is being written, on any process.

    Raises:
      CheckpointError: the write failed; the steps before it are untouched.
    """
    if self._thread is None:
      return
    self._thread.join()
    self._thread = None
    error, self._error = self._error, None
    failed = error is not None
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      failed = multihost_utils.process_allgather(np.array([failed])).any()
    if error is not None:
      raise CheckpointError(self._failure(error)) from error
    if failed:
      raise CheckpointError(
        f"checkpoint {self._step} in {self.directory} was not written: another "
        "process failed, see its message"
      )

  def steps(self) -> list[int]:
    """The finished steps, ascending."""
    return [
      s
      for s in _numbers(self.directory)
      if (self.directory / str(s) / manifest.NAME).is_file()
    ]

  def latest(self) -> int | None:
    """The newest finished step, or None."""
    return max(self.steps(), default=None)

  def extra(self, step: int) -> dict[str, Any] | None:
    """What was saved as `extra` beside a step."""
    try:
      return manifest.read(self.directory / str(step), step=step)["extra"]
    except DamageError as error:
      raise CheckpointError(_refusal(self.directory, {step: error})) from None

  def restore(
    self, target: State, step: int | None = None
  ) -> tuple[int, State] | None:
    """The newest state that is whole, on the devices that `target` names.

    A damaged step is reported, left where it is and walked past.

    Args:
      target: the state's tree with a `jax.ShapeDtypeStruct` with a sharding
        for each array, of this run's mesh: not necessarily the one it was
        saved on. Arrays will do; numpy leaves come back as numpy.
      step: this step and no other.

    Returns:
      (step, state), or None if there is no checkpoint at all.

    Raises:
      CheckpointError: no step, or not the given one, can be trusted, or it
        differs from `target` in a leaf, a shape or a dtype.
    """
    self.wait()
    found, damaged = _agree(lambda: _find(self.directory, step))
    self._damaged.update(damaged)
    if found is None:
      return None
    return found, _load(self.directory, found, target)

  def close(self) -> None:
    """Waits for the last write; raises what it raised."""
    self.wait()

  def _failure(self, error: BaseException) -> str:
    return (
      f"checkpoint {self._step} in {self.directory} was not written: "
      f"{_line(error)}; earlier ones are untouched, make room or mend access "
      "and run again"
    )

  def _commit(self, step: int) -> None:
    """Puts the complete `step.pending` in the place of `step`."""
    final = self.directory / str(step)
    old = self.directory / f"{step}.replaced"
    if final.exists():
      _remove(old)
      final.rename(old)
    (self.directory / f"{step}.pending").rename(final)
    manifest.sync(self.directory)
    self._damaged.discard(step)
    _remove(old)

  def _prune(self, newest: int) -> None:
    """Deletes what `keep` and `keep_every` don't hold on to.

    The step just written always stays: the ones above it may be damaged.
    """
    steps = [s for s in self.steps() if s not in self._damaged]
    kept = {newest, *steps[-self.keep :]}
    for step in steps:
      if step in kept or (self.keep_every and step % self.keep_every == 0):
        continue
      # Renamed first, so that a kill leaves no step with half its files.
      gone = self.directory / f"{step}.deleted"
      _remove(gone)
      (self.directory / str(step)).rename(gone)
      _remove(gone)

  def _tidy(self) -> None:
    """Finishes or removes what a kill left half done."""
    for path in self.directory.glob("*.pending"):
      number = path.name.removesuffix(".pending")
      if number.isdecimal() and (path / manifest.NAME).is_file():
        self._commit(int(number))
    for path in self.directory.glob("*.replaced"):
      final = path.with_suffix("")
      if path.stem.isdecimal() and not final.exists():
        path.rename(final)
    for path in list(self.directory.iterdir()):
      if _LEFTOVER.fullmatch(path.name) and not path.name.isdecimal():
        _remove(path)


def restore_params(
  directory: str | pathlib.Path,
  *,
  step: int | None = None,
  target: State | None = None,
  average: bool = True,
) -> tuple[int, Any]:
  """The parameters alone, without knowing the optimiser or the mesh.

  Args:
    directory: a checkpointer's folder.
    step: this step; None is the last good one.
    target: tree of `jax.ShapeDtypeStruct`; None gives nested dicts of numpy
      arrays (a list in the tree becomes a dict with the keys "0", "1", ...).
    average: the running average (`ema`) if the state has one.

  Returns:
    (step, params).

  Raises:
    CheckpointError: there is no checkpoint, or none that can be trusted.
  """
  directory = pathlib.Path(directory).absolute()
  found, _ = _agree(lambda: _find(directory, step))
  if found is None:
    raise CheckpointError(f"no checkpoint in {directory}; train there first")
  held = _held(directory / str(found), found)
  names = {name[0] for name in held}
  field = "ema" if average and "ema" in names else "params"
  if field not in names:
    raise CheckpointError(
      f"checkpoint {found} in {directory} has no params, but "
      f"{', '.join(sorted(names))}"
    )
  if target is None:
    target = leaves.nest(
      {
        name[1:]: np.empty(entry["shape"], entry["dtype"])
        for name, entry in held.items()
        if name[0] == field
      }
    )
  return found, _load(directory, found, target, field=field)


def _find(
  directory: pathlib.Path, step: int | None
) -> tuple[int | None, list[int]]:
  """The step to restore, every file of it checked, and the damaged ones."""
  numbers = _numbers(directory)
  if step is not None and step not in numbers:
    has = ", ".join(map(str, numbers)) or "none"
    raise CheckpointError(
      f"no checkpoint of step {step} in {directory}; there are: {has}"
    )
  damage: dict[int, DamageError] = {}
  for number in reversed(numbers) if step is None else [step]:
    try:
      manifest.verify(directory / str(number), step=number)
      return number, list(damage)
    except DamageError as error:
      damage[number] = error
      if step is None:
        log.say(
          f"warning: checkpoint {number} in {directory} can't be used: {error};"
          " looking at the one before"
        )
  if damage:
    raise CheckpointError(_refusal(directory, damage))
  return None, []


def _refusal(directory: pathlib.Path, damage: dict[int, DamageError]) -> str:
  reasons = "; ".join(f"step {s}: {e}" for s, e in damage.items())
  return (
    f"no checkpoint to trust in {directory}: {reasons}; restore another step, "
    "put back a copy, or remove the folder to start again"
  )


def _load(
  directory: pathlib.Path, step: int, target: State, *, field: str | None = None
) -> State:
  """Reads a checked step, or a field of it, into `target`'s tree."""
  path = directory / str(step)
  where = f"checkpoint {step} in {directory}"
  prefix = () if field is None else (field,)
  wanted = leaves.flatten(target, prefix=prefix)
  held = _held(path, step)
  part = {n: entry for n, entry in held.items() if n[: len(prefix)] == prefix}
  wrong = leaves.mismatch(part, wanted)
  if wrong is not None:
    raise CheckpointError(
      f"{where} doesn't fit: {wrong}; use the settings it was saved with, or "
      "another folder"
    )
  stored = [n for n, entry in held.items() if 0 not in entry["shape"]]
  templates = {
    n: leaves.template(n, wanted[n]) if n in wanted else None for n in stored
  }
  try:
    tree = _read(path, templates)
    out = [
      leaves.restore(
        n, leaves.pick(tree, n) if n in templates else None, w, part[n]
      )
      for n, w in wanted.items()
    ]
  except Exception as error:
    raise CheckpointError(f"{where} can't be read: {_line(error)}") from error
  return jax.tree.unflatten(jax.tree.structure(target), out)


def _held(path: pathlib.Path, step: int) -> dict[Name, dict[str, Any]]:
  """Name -> shape and dtype of what a checkpoint holds."""
  try:
    entries = manifest.read(path, step=step)["leaves"]
  except DamageError as error:  # it was whole a moment ago
    raise CheckpointError(_refusal(path.parent, {step: error})) from None
  return {tuple(e["path"]): e for e in entries}


def _agree(compute: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
  """What process 0 computes, or the error it raises, on every process."""
  if jax.process_count() == 1:
    return compute()
  from jax.experimental import multihost_utils

  answer = {"value": None, "error": None}
  if jax.process_index() == 0:
    try:
      answer["value"] = compute()
    except CheckpointError as error:
      answer["error"] = str(error)
  text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
  text = np.resize(text, size)
  text = np.asarray(multihost_utils.broadcast_one_to_all(text), np.uint8)
  answer = json.loads(text.tobytes())
  if answer["error"] is not None:
    raise CheckpointError(answer["error"])
  return tuple(answer["value"])


def _numbers(directory: pathlib.Path) -> list[int]:
  """Every step there is a folder for, whole or not, ascending."""
  if not directory.is_dir():
    return []
  names = (p.name for p in directory.iterdir())
  return sorted(int(n) for n in names if n.isdecimal() and n == str(int(n)))


def _remove(path: pathlib.Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())[:500] or type(error).__name__


# --- Orbax ---


def _orbax() -> Any:
  try:
    from orbax.checkpoint import v1
  except ImportError:
    import orbax.checkpoint.experimental.v1 as v1
  # A failed write is raised, once; Orbax's threads would also log it, each
  # with a traceback.
  noise = logging.getLogger("absl")
  if _quiet not in noise.filters:
    noise.addFilter(_quiet)
  return v1


def _quiet(record: logging.LogRecord) -> bool:
  return "_SignalingThread.run() raised an exception" not in str(record.msg)


def _write(path: pathlib.Path, tree: dict[str, Any]) -> Any:
  """Starts a write; `.result()` returns when all processes have written."""
  ocp = _orbax()
  # Made in the background, folders that can't be made leave threads that wait
  # for them for twenty minutes.
  context = ocp.Context()
  context.asynchronous.create_directories_asynchronously = False
  with context:
    return ocp.save_async(path, tree)


def _read(path: pathlib.Path, templates: dict[Name, Any]) -> dict[str, Any]:
  """Reads the arrays that have a template; None leaves one out."""
  ocp = _orbax()
  asked = {n: ocp.PLACEHOLDER if t is None else t for n, t in templates.items()}
  return ocp.load(path, leaves.nest(asked))
