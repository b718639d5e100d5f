"""Checkpoints: asynchronous, atomic, checked on restore, for any mesh.

A step counts once its SHA-256 manifest is on the disk, a restore checks every
file against it and walks back to the last good step, and nothing is cast,
padded or left out silently. `arrays` writes and reads what the files hold.
"""

import json
import operator
import pathlib
import shutil
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from isthmus.train import arrays, leaves, log, manifest, steps
from isthmus.train.leaves import Name
from isthmus.train.manifest import DamageError
from isthmus.train.steps import CheckpointError

__all__ = ["CheckpointError", "Checkpointer", "restore_params"]
_PATIENCE = 10.0  # seconds that a failing process waits for the others' writes


class Checkpointer:
  """Saves and restores the states of a run in one folder.

  With several processes, each of them calls every method, in the same order,
  on a folder they share. One checkpointer at a time writes to a folder.

  Args:
    directory: the folder; made if missing. What a killed save left half done
      in it is removed.
    keep: newest steps to keep.
    keep_every: also keep the steps that are multiples of this.

  Raises:
    CheckpointError: the folder can't be made or written.

  Example:
    >>> state = {"step": jnp.asarray(7), "params": {"w": jnp.arange(3.0)}}
    >>> with Checkpointer("ckpt") as ckpt:
    ...   ckpt.save(7, state)  # written by a thread
    ...   step, restored = ckpt.restore(state)
    >>> step, restored["params"]["w"].tolist()
    (7, [0.0, 1.0, 2.0])
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
    self._step: int | None = None  # the one being written, or the last one
    self._error: Exception | None = None
    self._damaged: set[int] = set()
    self._inode: int | None = None  # of the folder, on the first process
    if jax.process_index() == 0:
      try:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._inode = self.directory.stat().st_ino
        steps.tidy(self.directory)
      except OSError as error:
        raise CheckpointError(
          f"checkpoints can't be kept in {self.directory}: "
          f"{error.strerror or error}; mend access to it or give another folder"
        ) from error

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, kind, value, traceback) -> None:
    if kind is None:
      self.close()
    elif self._thread is not None:
      # Finish the write, but don't talk over the error that is on its way, and
      # don't wait long for processes that may not have had it, or are gone.
      self._thread.join(None if jax.process_count() == 1 else _PATIENCE)
      self._thread = None
      error, self._error = self._error, None
      if error is not None:
        log.say(f"warning: {self._failure(error)}")

  def save(
    self,
    step: int,
    state: Any,
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
      extra: JSON values to keep beside it; read them with `extra`.
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
    stored = {n: leaves.store(n, x) for n, x in named.items()}
    held = [{"path": n, **leaves.describe(x)} for n, x in named.items()]
    stored = {n: x for n, x in stored.items() if x.size}  # Orbax refuses others
    if not stored:
      raise ValueError("the state holds no arrays; there is nothing to save")
    self.wait()
    self._step = step
    pending = steps.pending(self.directory, step)
    first = jax.process_index() == 0
    try:
      if first:
        self.directory.stat()  # Orbax would make a folder that was deleted
        steps.remove(pending)
        self._make_room(stored)
      response = arrays.write(pending, leaves.nest(stored))
    except Exception as error:
      arrays.give_up()
      if first:
        self._give_back(pending)
      raise CheckpointError(self._failure(error)) from error

    def finish() -> None:
      try:
        response.result()  # every process has written
        if first:
          manifest.write(pending, step=step, leaves=held, extra=extra)
          steps.commit(self.directory, step)
          self._damaged.discard(step)
          steps.prune(
            self.directory,
            newest=step,
            keep=self.keep,
            keep_every=self.keep_every,
            damaged=self._damaged,
          )
      except Exception as error:
        self._error = error
        arrays.give_up()
        if not threading.main_thread().is_alive():  # nobody is left to raise it
          log.say(f"warning: {self._failure(error)}; close() the checkpointer")
        if first:
          self._give_back(pending)

    # With several processes it may wait for one that is gone.
    self._thread = threading.Thread(
      target=finish, name=f"checkpoint {step}", daemon=jax.process_count() > 1
    )
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

  def close(self) -> None:
    """Waits for the last write; raises what it raised."""
    self.wait()

  def steps(self) -> list[int]:
    """The finished steps, ascending."""
    return steps.finished(self.directory)

  def latest(self) -> int | None:
    """The newest finished step, or None."""
    return max(self.steps(), default=None)

  def extra(self, step: int) -> dict[str, Any] | None:
    """What was saved as `extra` beside a step."""
    return _manifest(self.directory, step)["extra"]

  def restore(
    self, target: Any, step: int | None = None
  ) -> tuple[int, Any] | None:
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
    found, damaged = _agree(lambda: steps.find(self.directory, step))
    self._damaged.update(damaged)
    if found is None:
      return None
    return found, _load(self.directory, found, target)

  def _is_gone(self) -> bool:
    """Whether it was deleted; what was being written may have made it again."""
    try:
      return self._inode not in (None, self.directory.stat().st_ino)
    except OSError:
      return self._inode is not None

  def _make_room(self, stored: dict[Name, Any]) -> None:
    """Refuses before anything is written what doesn't fit on the disk."""
    needed = sum(x.size * x.dtype.itemsize for x in stored.values())
    free = shutil.disk_usage(self.directory).free
    if needed > free:
      raise OSError(f"it takes {needed:,} bytes, and {free:,} are free")

  def _give_back(self, pending: pathlib.Path) -> None:
    """Frees what a save that failed had written."""
    for path in self.directory.glob(pending.name + "*"):
      shutil.rmtree(path, ignore_errors=True)

  def _failure(self, error: Exception) -> str:
    if self._is_gone():
      return log.refusal(FileNotFoundError(), self.directory)
    return (
      f"checkpoint {self._step} in {self.directory} was not written: "
      f"{_line(error)}; earlier ones are untouched, make room or mend access "
      "and run again"
    )


def restore_params(
  directory: str | pathlib.Path,
  *,
  step: int | None = None,
  target: Any = None,
  average: bool = True,
) -> tuple[int, Any]:
  """The parameters alone, without knowing the optimiser or the mesh.

  Nothing in the folder is changed, so a run may be writing to it.

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

  Example:
    >>> with Checkpointer("ckpt") as ckpt:
    ...   ckpt.save(7, {"params": {"w": jnp.arange(3.0)}, "opt_state": 0})
    >>> step, params = restore_params("ckpt")
    >>> step, params["w"].tolist()
    (7, [0.0, 1.0, 2.0])
  """
  directory = pathlib.Path(directory).absolute()
  found, _ = _agree(lambda: steps.find(directory, step))
  if found is None:
    raise CheckpointError(f"no checkpoint in {directory}; train there first")
  held = _held(_manifest(directory, found))
  fields = {name[0] for name in held}
  field = "ema" if average and "ema" in fields else "params"
  if field not in fields:
    raise CheckpointError(
      f"checkpoint {found} in {directory} has no params, but "
      f"{', '.join(sorted(fields))}; point at a training run's folder"
    )
  if target is None:
    try:
      target = leaves.nest(
        {
          name[1:]: np.empty(entry["shape"], entry["dtype"])
          for name, entry in held.items()
          if name[0] == field
        }
      )
    except (TypeError, ValueError, MemoryError) as error:
      raise CheckpointError(
        f"checkpoint {found} in {directory} can't be read: {_line(error)}; "
        "look at memory, and at who made it"
      ) from error
  return found, _load(directory, found, target, field=field)


def _load(
  directory: pathlib.Path, step: int, target: Any, *, field: str | None = None
) -> Any:
  """Reads a checked step, or a field of it, into `target`'s tree."""
  where = f"checkpoint {step} in {directory}"
  prefix = () if field is None else (field,)
  wanted = leaves.flatten(target, prefix=prefix)
  held = _held(_manifest(directory, step))
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
    tree = arrays.read(directory / str(step), templates)
    found = {n: leaves.pick(tree, n) for n in stored if n in wanted}
    out = [
      leaves.restore(n, found.get(n), leaf, part[n])
      for n, leaf in wanted.items()
    ]
  except Exception as error:
    raise CheckpointError(
      f"{where} can't be read: {_line(error)}; its files are as written, so "
      "look at memory, access and versions"
    ) from error
  return jax.tree.unflatten(jax.tree.structure(target), out)


def _manifest(directory: pathlib.Path, step: int) -> dict[str, Any]:
  try:
    return manifest.read(directory / str(step), step=step)
  except DamageError as error:
    raise CheckpointError(steps.refusal(directory, {step: error})) from None


def _held(body: dict[str, Any]) -> dict[Name, dict[str, Any]]:
  return {tuple(entry["path"]): entry for entry in body["leaves"]}


def _agree(compute: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
  """What process 0 computes, or the error it raises, on every process."""
  if jax.process_count() == 1:
    return compute()
  from jax.experimental import multihost_utils

  answer: dict[str, Any] = {"value": None, "error": None}
  if jax.process_index() == 0:
    try:
      answer["value"] = compute()
    except CheckpointError as error:
      answer["error"] = str(error)
  text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
  text = multihost_utils.broadcast_one_to_all(np.resize(text, size))
  answer = json.loads(np.asarray(text, np.uint8).tobytes())
  if answer["error"] is not None:
    raise CheckpointError(answer["error"])
  found, damaged = answer["value"]
  return found, damaged


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:500] or type(error).__name__
