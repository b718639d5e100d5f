"""The manifest: every byte of a checkpoint is answered for."""

import json
import os

import pytest

from isthmus.train import manifest
from isthmus.train.manifest import DamageError


@pytest.fixture
def path(tmp_path):
  (tmp_path / "deep" / "er").mkdir(parents=True)
  (tmp_path / "deep" / "er" / "data").write_bytes(os.urandom(1000))
  (tmp_path / "deep" / "empty").write_bytes(b"")
  (tmp_path / "meta").write_text("{}")
  manifest.write(
    tmp_path,
    step=3,
    leaves=[{"path": ["x"], "shape": [2], "dtype": "float32"}],
    extra={"rate": 0.1, "nan": float("nan")},
  )
  return tmp_path


def test_lists_every_file(path):
  body = manifest.verify(path, step=3)
  assert sorted(body["files"]) == ["deep/empty", "deep/er/data", "meta"]
  assert body["files"]["deep/er/data"]["size"] == 1000
  assert body["extra"]["rate"] == 0.1
  assert body["versions"]["jax"] and body["versions"]["orbax-checkpoint"]
  assert body["leaves"][0]["dtype"] == "float32"
  assert not (path / (manifest.NAME + ".part")).exists()
  (path / "new").write_text("a file that nobody listed does no harm")
  manifest.verify(path, step=3)


def test_any_flipped_bit_is_found(path):
  """In the data as in the manifest, wherever it is."""
  for name in ("deep/er/data", "meta", manifest.NAME):
    good = (path / name).read_bytes()
    for at in range(0, len(good), max(1, len(good) // 40)):
      bad = bytearray(good)
      bad[at] ^= 1
      (path / name).write_bytes(bad)
      if name == manifest.NAME and _same(good, bad):
        continue
      with pytest.raises(DamageError, match=name):
        manifest.verify(path, step=3)
    (path / name).write_bytes(good)
  manifest.verify(path, step=3)


def _same(good, bad):
  """Whether two JSON texts say the same: a blank may turn into a tab."""
  try:
    return json.loads(bytes(good)) == json.loads(bytes(bad))
  except ValueError:
    return False


@pytest.mark.parametrize(
  ("harm", "words"),
  [
    (lambda p: (p / "meta").unlink(), "meta: missing"),
    (lambda p: (p / "meta").write_text("{}}"), "meta: 3 bytes, 2 were written"),
    (lambda p: (p / "deep/empty").write_text("x"), "1 bytes, 0 were"),
    (lambda p: (p / manifest.NAME).unlink(), "missing, the save was not"),
    (lambda p: (p / manifest.NAME).write_text("[]"), "not a manifest"),
    (lambda p: (p / manifest.NAME).write_text("{}"), "not a manifest"),
  ],
)
def test_damage_is_named(path, harm, words):
  harm(path)
  with pytest.raises(DamageError, match=words):
    manifest.verify(path, step=3)


def test_of_another_step_or_format(path, monkeypatch):
  with pytest.raises(DamageError, match="of step 3, in folder 4"):
    manifest.verify(path, step=4)
  monkeypatch.setattr(manifest, "FORMAT", 2)
  with pytest.raises(DamageError, match="format 1, this version reads 2"):
    manifest.read(path, step=3)


def test_the_data_is_on_disk_before_the_manifest(path, monkeypatch):
  """Order of the flushes: files, their folders, the manifest, its folder."""
  flushed = []
  real = os.fsync

  def fsync(handle):
    flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
    real(handle)

  monkeypatch.setattr(os, "fsync", fsync)
  manifest.write(path, step=3, leaves=[], extra=None)
  part = flushed.index(manifest.NAME + ".part")
  assert {"data", "empty", "meta", "er", "deep"} <= set(flushed[:part])
  assert flushed.index("data") < flushed.index("er") < flushed.index("deep")
  assert flushed[part + 1 :] == [path.name]
