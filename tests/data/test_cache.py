"""Token streams on disk: whole or rebuilt, and built by one process."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from isthmus.data.cache import Stream, cache_folder, collect, open_cached


class Pieces:
  """Three documents; counts how often it is asked."""

  def __init__(self, sizes=True):
    self.sizes, self.built = sizes, 0

  def __call__(self):
    self.built += 1
    for n in (3, 1, 4):
      tokens = np.arange(n, dtype=np.uint16) + n
      yield Stream(tokens, tokens.astype(np.uint32) if self.sizes else None)


def check(stream, sizes=True):
  expected = collect(Pieces(sizes))
  np.testing.assert_array_equal(stream.tokens, expected.tokens)
  assert stream.tokens.dtype == np.uint16
  assert (stream.sizes is None) == (not sizes)
  if sizes:
    np.testing.assert_array_equal(stream.sizes, expected.sizes)


@pytest.mark.parametrize("sizes", [True, False])
def test_built_once_then_mapped(tmp_path, sizes):
  pieces = Pieces(sizes)
  check(open_cached("k", pieces, folder=tmp_path), sizes)
  stream = open_cached("k", pieces, folder=tmp_path)
  check(stream, sizes)
  assert isinstance(stream.tokens, np.memmap)
  assert pieces.built == 1
  open_cached("other", pieces, folder=tmp_path)
  assert pieces.built == 2


def _flip(path):
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)


DAMAGE = {
  "truncated": lambda e: os.truncate(e / "tokens.npy", 130),
  "empty": lambda e: os.truncate(e / "tokens.npy", 0),
  "flipped bit": lambda e: _flip(e / "sizes.npy"),
  "missing": lambda e: (e / "tokens.npy").unlink(),
  "foreign array": lambda e: np.save(e / "tokens.npy", np.zeros(8)),
  "no digests": lambda e: (e / "digests.json").unlink(),
  "bad digests": lambda e: (e / "digests.json").write_text("[1]"),
  "foreign digests": lambda e: (e / "digests.json").write_text("{}"),
  "binary digests": lambda e: (e / "digests.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_built_anew(tmp_path, damage):
  pieces = Pieces()
  open_cached("k", pieces, folder=tmp_path)
  DAMAGE[damage](tmp_path / "text" / "k")
  check(open_cached("k", pieces, folder=tmp_path))
  assert pieces.built == 2


def test_a_file_in_the_entrys_place_is_replaced(tmp_path):
  (tmp_path / "text").mkdir()
  (tmp_path / "text" / "k").write_text("foreign")
  check(open_cached("k", Pieces(), folder=tmp_path))


def test_a_failed_build_leaves_nothing(tmp_path):
  def fail():
    yield from Pieces()()
    raise RuntimeError("halfway")

  left = tmp_path / "text" / "k.part-dead"
  left.mkdir(parents=True)
  with pytest.raises(RuntimeError, match="halfway"):
    open_cached("k", fail, folder=tmp_path)
  names = {p.name for p in (tmp_path / "text").iterdir()}
  assert names <= {"k.lock"}
  check(open_cached("k", Pieces(), folder=tmp_path))


def test_folder_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "mine"))
  assert cache_folder() == tmp_path / "mine"
  monkeypatch.delenv("ISTHMUS_CACHE")
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert cache_folder() == tmp_path / "isthmus"
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert cache_folder() == pathlib.Path.home() / ".cache" / "isthmus"


def test_a_folder_that_cannot_be_written_names_the_remedy(
  tmp_path, monkeypatch
):
  def refuse(*args, **kwargs):
    raise PermissionError("read-only")

  monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
  with pytest.raises(PermissionError, match="ISTHMUS_CACHE"):
    open_cached("k", Pieces(), folder=tmp_path)


BUILDER = """
import sys, time, pathlib
import numpy as np
from isthmus.data.cache import Stream, open_cached
folder, me = pathlib.Path(sys.argv[1]), sys.argv[2]
def pieces():
  (folder / f"built-{me}").touch()
  time.sleep(0.5)
  yield Stream(np.arange(1000, dtype=np.uint16), None)
(folder / f"ready-{me}").touch()
while not (folder / "go").exists(): time.sleep(0.01)
stream = open_cached("k", pieces, folder=folder)
assert stream.tokens.sum() == 499500
"""


def test_two_processes_build_one_entry_once(tmp_path):
  workers = [
    subprocess.Popen([sys.executable, "-c", BUILDER, str(tmp_path), str(i)])
    for i in range(2)
  ]
  deadline = time.monotonic() + 60
  while len(list(tmp_path.glob("ready-*"))) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  (tmp_path / "go").touch()
  assert [worker.wait(60) for worker in workers] == [0, 0]
  assert len(list(tmp_path.glob("built-*"))) == 1
