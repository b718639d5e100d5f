"""Files made to do harm, and what is held of those who read them."""

import contextlib
import gc
import gzip
import io
import pathlib
import struct
import tarfile
import time
import zipfile

import numpy as np
import pytest

from isthmus.data.archive import extract

MAX_BYTES = 10**7


def working_folder(tmp_path, monkeypatch):
  """A fixture: chosen, with the cache beside, so that a snapshot sees all."""
  (tmp_path / "outer" / "inner").mkdir(parents=True)
  monkeypatch.chdir(tmp_path / "outer" / "inner")
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "outer" / "cache"))
  return tmp_path / "outer" / "inner"


def snapshot():
  """Path -> content, less the locks and the cache's folders, which stay."""
  root = pathlib.Path.cwd().parents[1]
  return {
    path: path.read_bytes() if path.is_file() else None
    for path in root.rglob("*")
    if path.suffix != ".lock" and path.name not in ("cache", "archives")
  }


@contextlib.contextmanager
def quick(limit=1.0):
  """Within a second, by the clock or by this process's own time.

  By the clock other processes count too, by the process's time its other
  threads: what is slow is slow by both. Collecting the garbage of whatever
  ran before is no part of it.
  """
  collecting = gc.isenabled()
  gc.disable()
  begin = time.perf_counter(), time.process_time()
  try:
    yield
    end = time.perf_counter(), time.process_time()
  finally:
    if collecting:
      gc.enable()
  spent = min(end[0] - begin[0], end[1] - begin[1])
  assert spent <= limit, f"took {spent:.2f} s"


def assert_refused(read, path, cause):
  """One line that names the file and the cause, in a second, writing naught."""
  before = snapshot()
  with quick(), pytest.raises((ValueError, RuntimeError), match=cause) as info:
    read(path)
  said = str(info.value)
  assert path.name in said and "\n" not in said and len(said) < 500, said
  assert snapshot() == before


def unpack(path):
  target = path.parent / "out"
  extract(path, target, max_bytes=MAX_BYTES, max_files=1000)


def zipped(path, *members):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    for name, content in members:
      file.writestr(name, content)
  return path


def tarred(path, *members):
  """members: (name, content), or a TarInfo without content."""
  mode = "w:gz" if path.suffix == ".gz" else "w"
  with tarfile.open(path, mode) as file:
    for member in members:
      if isinstance(member, tarfile.TarInfo):
        file.addfile(member)
        continue
      info = tarfile.TarInfo(member[0])
      info.size = len(member[1])
      file.addfile(info, io.BytesIO(member[1]))
  return path


def idx(array, shape=None):
  shape = array.shape if shape is None else shape
  return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + (
    array.tobytes()
  )


ITEMS = np.random.default_rng(0).integers(0, 256, (6, 7, 5), np.uint8)


def nifti_bytes(array):
  nibabel = pytest.importorskip("nibabel")
  return nibabel.Nifti1Image(array, np.diag([1, 2, 3, 1])).to_bytes()


def read_nifti(path):
  from isthmus.data import nifti

  return nifti.read(path)


def brats_case(folder):
  """A case of scans and a label; gives the path of its T1."""
  label = ITEMS // 64
  for kind in ("-t2f", "-t1c", "-t2w", "-t1n", "-seg"):
    path = folder / f"case{kind}.nii.gz"
    array = label if kind == "-seg" else ITEMS
    path.write_bytes(gzip.compress(nifti_bytes(array), mtime=0))
  return folder / "case-t1n.nii.gz"


def read_brats(path):
  """The one example of a case, from a path of one of its files."""
  from isthmus.data.brats import BratsFolder

  return BratsFolder(path.parent, size=None, eval_fraction=0.0).open("train")[0]
