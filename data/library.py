"""The Python standard library's own source as a corpus: nothing to download."""

import dataclasses
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterator

from isthmus.data.source import check_split
from isthmus.data.text import check_fraction, is_held_out

# Not the library itself, or different on every machine; and `encodings`, whose
# generated tables are near copies of one another: held out, they would be
# known by heart.
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests",
            "idle_test", "encodings"}  # fmt: skip
_LOCAL = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


@dataclasses.dataclass(frozen=True)
class PythonLibrary:
  """Source files of the running interpreter's standard library.

  Tests, installed packages, build leftovers, generated codec tables, links,
  empty files and copies of a file are left out. A file is held out by a hash
  of its path, so the split is the same on every machine that has this version
  of Python.

  Args:
    eval_fraction: share of the files that is held out.

  Raises:
    ValueError: eval_fraction outside [0, 1].
    FileNotFoundError: when read, an interpreter that comes without sources.

  Example:
    >>> name, text = next(iter(PythonLibrary().documents("eval")))
    >>> name.endswith(".py"), len(text) > 0
    (True, True)
  """

  eval_fraction: float = 0.05

  def __post_init__(self):
    check_fraction(self.eval_fraction)

  def documents(self, split: str) -> Iterator[tuple[str, bytes]]:
    """(path, source) of each file of a split."""
    check_split(split)
    for name, text in _files():
      if is_held_out(name, self.eval_fraction) == (split == "eval"):
        yield name, text

  def describe(self) -> dict[str, str | int]:
    """Python version, a hash of all files, and files and bytes per split.

    Two machines whose hashes agree train on the same text.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, text in _files():
      digest.update(f"{name}\0{len(text)}\0".encode() + text)
    out: dict[str, str | int] = {
      "python": platform.python_version(),
      "fingerprint": digest.hexdigest(),
    }
    for split in ("train", "eval"):
      sizes = [len(text) for _, text in self.documents(split)]
      out[f"{split}_files"], out[f"{split}_bytes"] = len(sizes), sum(sizes)
    return out


def _files() -> Iterator[tuple[str, bytes]]:
  """(relative path, content) in order of the path, the first of each copy."""
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  names = []
  for folder, inner, files in os.walk(root, followlinks=False):
    inner[:] = [d for d in inner if d not in _SKIPPED and not _is_local(d)]
    for file in files:
      path = pathlib.Path(folder, file)
      if file.endswith(".py") and not _is_local(file) and not path.is_symlink():
        names.append(path.relative_to(root).as_posix())
  if not names:
    raise FileNotFoundError(
      f"no Python sources in {root}; this interpreter comes without them, use"
      " TextFiles with a folder of your own"
    )
  seen = set()
  for name in sorted(names):
    text = (root / name).read_bytes()
    digest = hashlib.sha256(text).digest()
    if text and digest not in seen:
      seen.add(digest)
      yield name, text


def _is_local(name: str) -> bool:
  return name.startswith(_LOCAL)
