"""A checkpoint from a stranger, whose hashes are right.

Fault: anybody can write a manifest. This one's names lead out of the folder,
a file is a link, the arrays are a million times larger than
their files, the metadata name a class to load, the database points elsewhere.
Promised: refused in one line, exit 1, before an array is read; no class is
imported, no file outside the folder and no address is opened, nothing is
written.
"""

import json
import pathlib
import shutil
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train import manifest
from isthmus.train.ckpt import Checkpointer, CheckpointError, restore_params


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved")
  with Checkpointer(folder) as ckpt:
    params = {"w": jnp.ones((64, 64)), "b": jnp.zeros(3)}
    ckpt.save(1, {"params": params, "step": jnp.int32(1)})
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "ckpt")


def _signed(folder, change=lambda body: None):
  """Writes the manifest anew, with hashes that are right."""
  step = folder / "1"
  body = json.loads((step / manifest.NAME).read_text())
  (step / manifest.NAME).unlink()
  manifest.write(step, step=1, leaves=body["leaves"], extra=body["extra"])
  body = json.loads((step / manifest.NAME).read_text())
  del body["sha256"]
  change(body)
  body["sha256"] = manifest._digest(body)
  (step / manifest.NAME).write_text(json.dumps(body))


def _refused(folder, *words):
  before = sorted(p for p in folder.parent.rglob("*"))
  with pytest.raises(CheckpointError) as error:
    restore_params(folder)
  assert len(str(error.value).splitlines()) == 1
  for word in words:
    assert word in str(error.value), error.value
  assert sorted(p for p in folder.parent.rglob("*")) == before


def test_signed_anew_it_is_taken(folder):
  _signed(folder)
  assert restore_params(folder)[0] == 1


def _leaf(**changes):
  return lambda body: body["leaves"][0].update(changes)


def _file(name):
  return lambda body: body["files"].update(
    {name: dict(size=4, sha256="0" * 64)}
  )


MANIFESTS = {
  "a file above": (_file("../secret"), "'../secret'"),
  "a file from the root": (_file("/etc/passwd"), "'/etc/passwd'"),
  "a file by a detour": (_file("state/../../x"), "'state/../../x'"),
  "an array above": (_leaf(path=["params", "../../x"]), "'../../x'"),
  "an array of the root": (_leaf(path=["params", "/x"]), "'/x'"),
  "a number for a name": (_leaf(path=["params", 3]), "not a manifest"),
  "an array that bursts": (_leaf(shape=[10**6] * 3), "elements of arrays"),
  "a negative size": (_leaf(shape=[-4, 4]), "[-4, 4]"),
  "no shape": (lambda body: body["leaves"][0].pop("shape"), "'shape'"),
  "a dtype of objects": (_leaf(dtype="O", path=["params", "o"]), "object"),
  "a dtype that is none": (_leaf(dtype="import os"), "import os"),
  "a dtype that is a number": (_leaf(dtype=3), "an array 3"),
  "leaves that are text": (lambda b: b.update(leaves="x"), "not a manifest"),
  "files that are a list": (lambda b: b.update(files=[]), "not a manifest"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_lies(folder, what):
  change, word = MANIFESTS[what]
  _signed(folder, change)
  _refused(folder, word)


def test_a_deep_manifest(folder):
  (folder / "1" / manifest.NAME).write_text("[" * 100_000)
  _refused(folder, "not a manifest")


def test_a_link(folder, tmp_path):
  """It would read a file of ours as if it were the checkpoint's."""
  data = next((folder / "1").glob("state/*/d/*"))
  secret = tmp_path / "secret"
  data.rename(secret)
  data.symlink_to(secret)
  _signed(folder)
  _refused(folder, "a link")


def test_a_class_to_load(folder, tmp_path, monkeypatch):
  """Orbax writes down which class saved; it isn't imported on restore."""
  (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
  monkeypatch.syspath_prepend(str(tmp_path))
  path = folder / "1" / "_CHECKPOINT_METADATA"
  body = json.loads(path.read_text())
  assert "PyTreeHandler" in body["item_handlers"]["state"]
  body["item_handlers"]["state"] = "evil.Handler"
  path.write_text(json.dumps(body))
  _signed(folder)
  step, params = restore_params(folder)  # as what it is, arrays
  assert step == 1 and np.all(params["w"] == 1)
  assert "evil" not in sys.modules


@pytest.mark.parametrize("key", ["driver", "kvstore", "ts_spec", "base"])
def test_a_spec_in_the_metadata(folder, key):
  """TensorStore's specs are made by code, not read from the checkpoint."""
  path = folder / "1" / "state" / "_METADATA"
  body = json.loads(path.read_text())
  spec = {"driver": "http", "base_url": "http://127.0.0.1:9/", "path": "x"}
  body[key] = spec
  for entry in body["tree_metadata"].values():
    entry["value_metadata"][key] = spec
  body["custom_metadata"] = {key: spec}
  path.write_text(json.dumps(body))
  _signed(folder)
  step, params = restore_params(folder)
  assert step == 1 and np.all(params["w"] == 1)


# --- the database of arrays ---

HERE = b"ocdbt.process_0/"  # where the root says that the data is
PLACES = {
  "a folder beside": (b"ocdbt.process_1/", "1/state/ocdbt.process_1", True),
  "above": (b"../../../elsewh/", "../elsewh", False),
  "by a detour": (b"x/../../../../y/", "../y", False),
  "an address": (b"http://[::1]:9//", "1/state/http:/[::1]:9", None),
}


@pytest.mark.parametrize("where", PLACES)
def test_a_database_that_points_elsewhere(tmp_path, where):
  """What Orbax stores arrays in names the files of its nodes.

  TensorStore takes such a name as a path below its folder and refuses to go
  up; an address is one more folder's name.
  """
  import tensorstore as ts
  from tensorboardX.crc32c import crc32c

  root = tmp_path / "ckpt" / "1" / "state"
  root.mkdir(parents=True)
  context = ts.Context()

  def opened(path):
    spec = {"driver": "ocdbt", "base": f"file://{path}/"}
    spec["config"] = {"compression": None, "max_inline_value_bytes": 0}
    return ts.KvStore.open(spec, context=context).result()

  opened(root / "ocdbt.process_0").write(b"k", b"secret" * 99).result()
  change = ts.Transaction(atomic=True)
  child = opened(root / "ocdbt.process_0")
  parent = opened(root).with_transaction(change)
  child.experimental_copy_range_to(parent).result()
  change.commit_sync()

  name, place, found = PLACES[where]
  assert len(name) == len(HERE)
  target = pathlib.Path(tmp_path / "ckpt" / place)
  target.parent.mkdir(parents=True, exist_ok=True)
  (root / "ocdbt.process_0").rename(target)
  changed = 0
  for path in root.rglob("*"):
    if path.is_file() and HERE in path.read_bytes():
      body = path.read_bytes().replace(HERE, name)[:-4]
      path.write_bytes(body + struct.pack("<I", crc32c(body)))
      changed += 1
  assert changed == 1
  again = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{root}/"})
  if found:
    assert again.result().read(b"k").result().value == b"secret" * 99
  elif found is None:  # found below the folder, or refused: not on the net
    value = again.result().read(b"k")
    try:
      assert value.result().value == b"secret" * 99
    except ValueError as error:
      assert str(root) in str(error)
  else:
    with pytest.raises(ValueError, match="Invalid key"):
      again.result().read(b"k").result()
