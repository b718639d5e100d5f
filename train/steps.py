"""A folder of checkpoints, one a step: which count, which can be trusted.

12/                  a finished step: its files and MANIFEST.json
15.pending/          being written; renamed to 15 when all of it is on disk
9.deleted, 9.replaced   on their way out
"""

import pathlib
import re
import shutil

from isthmus.train import log, manifest
from isthmus.train.manifest import DamageError

_LEFTOVER = re.compile(
  r"\d+(\.pending|\.replaced|\.deleted|(\.pending)?\.orbax-checkpoint-tmp.*)"
)


class CheckpointError(RuntimeError):
  """A checkpoint that can't be written, found or trusted, and what to do."""


class RunError(CheckpointError):
  """A run that can't go on, but will from its last checkpoint."""


def numbers(directory: pathlib.Path) -> list[int]:
  """Every step there is something of, whole or not, ascending.

  Example:
    >>> for name in ("3", "12", "15.pending"):
    ...   pathlib.Path(name).mkdir()
    >>> numbers(pathlib.Path())
    [3, 12]
  """
  if not directory.is_dir():
    return []
  names = (p.name for p in directory.iterdir())
  return sorted(int(n) for n in names if n.isdecimal() and n == str(int(n)))


def finished(directory: pathlib.Path) -> list[int]:
  """The steps that have a manifest, ascending.

  Example:
    >>> pathlib.Path("3").mkdir()
    >>> pathlib.Path("12").mkdir()
    >>> manifest.write(pathlib.Path("12"), step=12, leaves=[], extra=None)
    >>> finished(pathlib.Path())
    [12]
  """
  return [
    s
    for s in numbers(directory)
    if (directory / str(s) / manifest.NAME).is_file()
  ]


def pending(directory: pathlib.Path, step: int) -> pathlib.Path:
  """Where a step is written before it counts.

  Example:
    >>> pending(pathlib.Path("ckpt"), 15).name
    '15.pending'
  """
  return directory / f"{step}.pending"


def find(
  directory: pathlib.Path, step: int | None
) -> tuple[int | None, list[int]]:
  """The newest step that is whole, and the damaged ones above it.

  Args:
    directory: the folder.
    step: look at this step only.

  Returns:
    (step, damaged steps); (None, []) if there is no step at all.

  Raises:
    CheckpointError: there are steps, or there should be one, and none is good.

  Example:
    >>> for step in (3, 12):
    ...   path = pathlib.Path(str(step))
    ...   path.mkdir()
    ...   manifest.write(path, step=step, leaves=[], extra=None)
    >>> _ = pathlib.Path("12", "MANIFEST.json").write_text("{}")
    >>> find(pathlib.Path(), None)  # says on stderr what is wrong with 12
    (3, [12])
  """
  try:
    there = numbers(directory)
  except OSError as error:
    raise CheckpointError(
      f"{directory} can't be read: {error.strerror or error}; mend access to it"
    ) from error
  if step is not None and step not in there:
    has = ", ".join(map(str, there)) or "none"
    raise CheckpointError(
      f"no checkpoint of step {step} in {directory}; there are: {has}"
    )
  damage: dict[int, DamageError] = {}
  for number in reversed(there) if step is None else [step]:
    try:
      manifest.verify(directory / str(number), step=number)
      return number, list(damage)
    except DamageError as error:
      damage[number] = error
      if step is None:
        log.say(
          f"warning: checkpoint {number} in {directory} can't be used: {error};"
          " looking for one before it"
        )
  if damage:
    raise CheckpointError(refusal(directory, damage))
  return None, []


def refusal(directory: pathlib.Path, damage: dict[int, DamageError]) -> str:
  """Says of each step what is wrong with it, and what can be done.

  Example:
    >>> damage = {12: DamageError("data: missing")}
    >>> refusal(pathlib.Path("ckpt"), damage)
    'no checkpoint to trust in ckpt: step 12: data: missing; put a copy ...'
  """
  reasons = "; ".join(f"step {s}: {e}" for s, e in damage.items())
  others = [s for s in finished(directory) if s not in damage]
  instead = f"restore step {others[-1]}, " if others else ""
  return (
    f"no checkpoint to trust in {directory}: {reasons}; {instead}put a copy "
    "back, or remove the folder to start again"
  )


def commit(directory: pathlib.Path, step: int) -> None:
  """Puts a complete pending step in its place; what was there is deleted.

  The old one goes only when the new one, which is whole, has its name: a kill
  in between is made good by `tidy`.

  Example:
    >>> pathlib.Path("15.pending").mkdir()
    >>> commit(pathlib.Path(), 15)
    >>> numbers(pathlib.Path())
    [15]
  """
  final, old = directory / str(step), directory / f"{step}.replaced"
  if final.exists():
    remove(old)
    final.rename(old)
  pending(directory, step).rename(final)
  manifest.sync(directory)
  remove(old)


def prune(
  directory: pathlib.Path,
  *,
  newest: int,
  keep: int,
  keep_every: int | None,
  damaged: set[int],
) -> None:
  """Deletes the finished steps that nothing holds on to.

  Args:
    directory: the folder.
    newest: the step just written; it stays, since it is known to be whole.
    keep: how many of the highest steps stay.
    keep_every: multiples of this stay.
    damaged: steps that don't count, and aren't deleted either.

  Example:
    >>> for step in (1, 2, 3, 4):
    ...   path = pathlib.Path(str(step))
    ...   path.mkdir()
    ...   manifest.write(path, step=step, leaves=[], extra=None)
    >>> prune(pathlib.Path(), newest=4, keep=1, keep_every=2, damaged=set())
    >>> finished(pathlib.Path())
    [2, 4]
  """
  steps = [s for s in finished(directory) if s not in damaged]
  kept = {newest, *steps[-keep:]}
  for step in steps:
    if step in kept or (keep_every and step % keep_every == 0):
      continue
    # Renamed first, so that a kill leaves no step with half its files.
    gone = directory / f"{step}.deleted"
    remove(gone)
    (directory / str(step)).rename(gone)
    remove(gone)


def tidy(directory: pathlib.Path) -> None:
  """Finishes what a kill left complete, and removes what it left half done.

  Example:
    >>> pathlib.Path("15.pending").mkdir()  # a save that a kill cut off
    >>> tidy(pathlib.Path())
    >>> list(pathlib.Path().glob("15*"))
    []
  """
  for path in list(directory.glob("*.pending")):
    if path.stem.isdecimal() and (path / manifest.NAME).is_file():
      commit(directory, int(path.stem))
  for path in list(directory.glob("*.replaced")):
    if path.stem.isdecimal() and not path.with_suffix("").exists():
      path.rename(path.with_suffix(""))
  for path in list(directory.iterdir()):
    if _LEFTOVER.fullmatch(path.name):
      remove(path)


def remove(path: pathlib.Path) -> None:
  """Deletes a file or a folder with all that is in it, if it is there.

  Example:
    >>> pathlib.Path("9.deleted", "d").mkdir(parents=True)
    >>> remove(pathlib.Path("9.deleted"))
    >>> pathlib.Path("9.deleted").exists()
    False
  """
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
