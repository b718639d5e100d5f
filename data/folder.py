"""Folders that others have filled: their files, and links refused."""

import os
import pathlib
from collections.abc import Iterator


def walk(root: str | os.PathLike) -> Iterator[pathlib.Path]:
  """The files below a folder, a folder's own before those further down.

  Args:
    root: the folder; ~ is the home.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: see `check_link`.

  Example:
    >>> for name in ("b", "a/c"):
    ...   pathlib.Path("x", name).parent.mkdir(parents=True, exist_ok=True)
    ...   pathlib.Path("x", name).touch()
    >>> [path.as_posix() for path in walk("x")]
    ['x/b', 'x/a/c']
  """
  folder = pathlib.Path(root).expanduser()
  if not folder.is_dir():
    raise FileNotFoundError(f"no folder {os.fspath(root)!r}")
  inside = folder.resolve()
  for place, inner, files in os.walk(folder):
    inner.sort()
    for name in (*inner, *sorted(files)):
      # A walk would pass over linked folders in silence.
      check_link(pathlib.Path(place, name), inside)
    yield from (pathlib.Path(place, name) for name in sorted(files))


def check_link(path: pathlib.Path, inside: pathlib.Path) -> None:
  """Links to files within the folder are fine, others are refused.

  Args:
    path: what may be a link.
    inside: the folder, resolved.

  Raises:
    ValueError: a link to a folder, or to a file elsewhere.

  Example:
    >>> pathlib.Path("x").mkdir()
    >>> pathlib.Path("x", "home").symlink_to("/")
    >>> check_link(pathlib.Path("x", "home"), pathlib.Path("x").resolve())
    Traceback (most recent call last):
    ValueError: 'x/home' is a link to a folder; name that folder itself
  """
  if not path.is_symlink():
    return
  if path.is_dir():
    raise ValueError(
      f"{os.fspath(path)!r} is a link to a folder; name that folder itself"
    )
  if not path.resolve().is_relative_to(inside):
    raise ValueError(
      f"{os.fspath(path)!r} links out of {os.fspath(inside)!r}; copy the file"
      " into the folder"
    )
