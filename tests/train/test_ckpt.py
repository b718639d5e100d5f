"""Checkpoints: asynchronous, whole or not there, on any mesh, never garbage."""

import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from isthmus.train import manifest
from isthmus.train.ckpt import Checkpointer, CheckpointError, restore_params
from isthmus.train.export import load_safetensors


class State(NamedTuple):
  step: jax.Array
  params: dict
  opt_state: tuple
  keys: jax.Array
  ema: dict | None = None


def make_mesh(*shape: int) -> jax.sharding.Mesh:
  names = ("data", "model")[: len(shape)]
  devices = jax.devices()[: int(np.prod(shape))]
  return jax.make_mesh(
    shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices
  )


def make_state(step: int) -> State:
  keys = jax.random.split(jax.random.key(step), 8)
  params = {
    "up": {"kernel": jax.random.normal(keys[0], (16, 8), jnp.bfloat16)},
    "layers": [jnp.arange(8.0) + step, jnp.zeros((0, 4))],
  }
  opt_state = optax.adamw(1e-3).init(params)
  return State(jnp.int32(step), params, opt_state, keys)


def place(mesh, x):
  """Rows over the mesh's first axis, where they divide."""
  rows = mesh.shape["data"]
  spec = PartitionSpec("data") if x.ndim and x.shape[0] % rows == 0 else ()
  return NamedSharding(mesh, PartitionSpec(*spec))


def target_on(mesh, state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(mesh, x)),
    state,
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(
      np.asarray(x).reshape(-1).view(np.uint8),
      np.asarray(y).reshape(-1).view(np.uint8),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  """A folder with steps 1 and 2; copied, never changed."""
  folder = tmp_path_factory.mktemp("saved") / "ckpt"
  with Checkpointer(folder) as ckpt:
    for step in (1, 2):
      ckpt.save(step, make_state(step), extra={"name": "x", "lr": 0.1})
  return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
  return shutil.copytree(saved, tmp_path / "ckpt")


# --- what is saved comes back ---


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (4,), (1,)])
def test_restores_onto_other_meshes(tmp_path, shape):
  mesh = make_mesh(8)
  state = make_state(3)
  state = jax.tree.map(lambda x: jax.device_put(x, place(mesh, x)), state)
  assert len(state.keys.sharding.device_set) == 8
  target = target_on(make_mesh(*shape), state)
  with Checkpointer(tmp_path) as ckpt:
    assert ckpt.restore(target) is None
    ckpt.save(3, state)
    step, back = ckpt.restore(target)
  assert step == 3
  assert_same(back, state)
  for x, want in zip(
    jax.tree.leaves(back), jax.tree.leaves(target), strict=True
  ):
    assert x.sharding.is_equivalent_to(want.sharding, x.ndim)
  jax.random.normal(back.keys[5], (2,))  # still a key


def test_numpy_and_python_numbers_come_back_as_they_are(tmp_path):
  state = {
    "wide": np.array([1.0, np.pi]),
    "scalar": np.float64(0.1),
    "count": 7,
    "rate": 0.5,
    "on": True,
  }
  with Checkpointer(tmp_path) as ckpt:
    ckpt.save(0, state)
    _, back = ckpt.restore(state)
  assert {k: type(v) for k, v in back.items()} == {
    k: type(v) for k, v in state.items()
  }
  assert back["wide"].dtype == np.float64
  np.testing.assert_array_equal(back["wide"], state["wide"])
  assert [back[k] for k in ("scalar", "count", "rate", "on")] == [
    state[k] for k in ("scalar", "count", "rate", "on")
  ]


def test_extra_is_kept_beside_the_arrays(folder):
  with Checkpointer(folder) as ckpt:
    assert ckpt.extra(2) == {"name": "x", "lr": 0.1}
    assert (ckpt.steps(), ckpt.latest()) == ([1, 2], 2)
    with pytest.raises(CheckpointError, match="step 9"):
      ckpt.extra(9)


def test_the_state_may_be_donated_and_overwritten_after_save(tmp_path):
  size = 1 << 21
  spoil = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
  )
  mesh = make_mesh(8)
  with Checkpointer(tmp_path) as ckpt:
    for step in range(3):
      one = jnp.arange(size, dtype=jnp.float32) + step
      many = jax.device_put(one * 2, place(mesh, one))
      host = np.arange(size, dtype=np.float32) + step
      want = {"one": np.array(one), "many": np.array(many), "host": host.copy()}
      jax.block_until_ready((one, many))
      ckpt.save(step, {"one": one, "many": many, "host": host})
      one, many = spoil(one), spoil(many)
      host[:] = -1
      jax.block_until_ready((one, many))
      _, back = ckpt.restore(want)
      for name in want:
        np.testing.assert_array_equal(back[name], want[name])


def test_restore_params_needs_no_target(folder, tmp_path):
  step, params = restore_params(folder)
  want = make_state(2).params
  assert step == 2
  np.testing.assert_array_equal(params["up"]["kernel"], want["up"]["kernel"])
  np.testing.assert_array_equal(params["layers"]["0"], want["layers"][0])
  assert params["layers"]["1"].shape == (0, 4)
  mesh = make_mesh(2)
  _, params = restore_params(folder, step=1, target=target_on(mesh, want))
  assert_same(params, make_state(1).params)
  assert len(params["up"]["kernel"].sharding.device_set) == 2
  with pytest.raises(CheckpointError, match="no checkpoint in"):
    restore_params(tmp_path / "empty")
  assert not (tmp_path / "empty").exists()


def test_restore_params_takes_the_average_if_there_is_one(tmp_path):
  state = make_state(1)
  ema = jax.tree.map(lambda x: x + 1, state.params)
  with Checkpointer(tmp_path) as ckpt:
    ckpt.save(1, state._replace(ema=ema))
  kernels = [
    restore_params(tmp_path, average=a)[1]["up"]["kernel"]
    for a in (True, False)
  ]
  np.testing.assert_array_equal(kernels[0], ema["up"]["kernel"])
  np.testing.assert_array_equal(kernels[1], state.params["up"]["kernel"])


# --- asynchronous ---


def test_save_returns_before_the_step_counts(tmp_path, monkeypatch):
  gate = threading.Event()
  write = manifest.write

  def held(path, **fields):
    assert gate.wait(20)
    write(path, **fields)

  monkeypatch.setattr(manifest, "write", held)
  with Checkpointer(tmp_path) as ckpt:
    ckpt.save(1, make_state(1))
    assert ckpt.steps() == []
    threading.Timer(0.3, gate.set).start()
    began = time.perf_counter()
    ckpt.save(2, make_state(2))  # waits for the first
    assert time.perf_counter() - began > 0.2
    assert 1 in ckpt.steps()
    ckpt.wait()
    assert ckpt.steps() == [1, 2]


def test_a_full_disk_is_told_at_the_next_call(folder):
  big = {"x": jnp.ones((1 << 20,))}
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  ckpt = Checkpointer(folder)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    ckpt.save(3, big)
    with pytest.raises(CheckpointError, match=r"checkpoint 3 in .*large"):
      ckpt.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
  assert_same(ckpt.restore(make_state(0))[1], make_state(2))
  ckpt.save(3, big, wait=True)
  assert ckpt.steps() == [1, 2, 3]


@pytest.mark.parametrize("call", ["save", "wait", "close", "with", "raise"])
def test_a_failed_write_is_raised_once(tmp_path, monkeypatch, call, capsys):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  ckpt = Checkpointer(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(manifest, "write", full)
    ckpt.save(1, make_state(1))
    ckpt._thread.join()
  if call == "raise":  # another error is told; this one is a warning
    with pytest.raises(KeyError), ckpt:
      raise KeyError
    assert "No space left" in capsys.readouterr().err
  else:
    with pytest.raises(CheckpointError, match="No space left") as caught:
      if call == "save":
        ckpt.save(2, make_state(2))
      elif call == "with":
        with ckpt:
          pass
      else:
        getattr(ckpt, call)()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
  ckpt.save(2, make_state(2), wait=True)
  assert ckpt.steps() == [2]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="file"):
    Checkpointer(tmp_path / "file")


# --- damage ---


def data_file(step: pathlib.Path) -> pathlib.Path:
  files = [p for p in step.rglob("*") if p.is_file() and "d" in p.parts]
  return max(files, key=lambda p: p.stat().st_size)


def flip(path: pathlib.Path, at: float = 0.5):
  data = bytearray(path.read_bytes())
  data[int(len(data) * at)] ^= 1
  path.write_bytes(data)


DAMAGE = {
  "flipped bit": (lambda s: flip(data_file(s)), "SHA-256"),
  "truncated": (lambda s: os.truncate(data_file(s), 10), "10 bytes"),
  "missing file": (lambda s: data_file(s).unlink(), "missing"),
  "metadata": (
    lambda s: (s / "state/_METADATA").write_text("{bad"),
    "state/_METADATA",
  ),
  "empty": (lambda s: (shutil.rmtree(s), s.mkdir()), "folder is empty"),
  "a file": (lambda s: (shutil.rmtree(s), s.write_text("")), manifest.NAME),
  "no manifest": (lambda s: (s / manifest.NAME).unlink(), manifest.NAME),
  "garbage manifest": (
    lambda s: (s / manifest.NAME).write_bytes(b"\xff\x00{"),
    manifest.NAME,
  ),
  "flipped manifest": (lambda s: flip(s / manifest.NAME, 0.1), manifest.NAME),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_walked_past(folder, capsys, kind):
  harm, word = DAMAGE[kind]
  target = make_state(0)
  harm(folder / "2")
  with Checkpointer(folder) as ckpt:
    step, state = ckpt.restore(target)
    lines = capsys.readouterr().err.splitlines()
    assert step == 1
    assert_same(state, make_state(1))
    assert len(lines) == 1 and "checkpoint 2" in lines[0] and word in lines[0]
    with pytest.raises(CheckpointError, match="step 2: ") as caught:
      ckpt.restore(target, 2)
    assert word in str(caught.value) and "restore step 1" in str(caught.value)
    assert (folder / "2").exists()
    ckpt.save(2, make_state(20), wait=True)
    step, state = ckpt.restore(target)
    assert step == 2
    assert_same(state, make_state(20))
  assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
  assert restore_params(folder)[0] == 2


def test_nothing_to_trust_is_an_error(folder):
  flip(data_file(folder / "1"))
  shutil.rmtree(folder / "2")
  (folder / "2").mkdir()
  with Checkpointer(folder) as ckpt:
    with pytest.raises(CheckpointError) as caught:
      ckpt.restore(make_state(0))
  text = str(caught.value)
  assert "step 1: " in text and "SHA-256" in text
  assert "step 2: the folder is empty" in text and "remove the folder" in text


def test_a_step_that_is_not_there(folder):
  with Checkpointer(folder) as ckpt:
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
      ckpt.restore(make_state(0), 7)


# --- a target that isn't what was saved ---


def narrow(state):
  kernel = jax.ShapeDtypeStruct((16, 8), jnp.float32)
  return state._replace(params={**state.params, "up": {"kernel": kernel}})


MISFITS = {
  "dtype": (narrow, r"params/up/kernel is bfloat16\[16,8\].*float32\[16,8\]"),
  "shape": (
    lambda s: s._replace(keys=s.keys[:4]),
    r"keys is key<fry>\[8\].*key<fry>\[4\]",
  ),
  "not a key": (
    lambda s: s._replace(keys=jax.random.key_data(s.keys)),
    r"keys is key<fry>\[8\].*uint32\[8,2\]",
  ),
  "another key": (
    lambda s: s._replace(
      keys=jax.eval_shape(
        lambda: jax.random.split(jax.random.key(0, impl="rbg"), 8)
      )
    ),
    r"keys is key<fry>\[8\].*key<rbg>\[8\]",
  ),
  "more leaves": (
    lambda s: s._replace(ema=s.params),
    r"ema/.* is missing in the checkpoint, .* \(and 2 more",
  ),
  "fewer leaves": (
    lambda s: s._replace(params={"up": s.params["up"]}),
    r"params/layers/0 is float32\[8\] in the checkpoint, missing",
  ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_misfit_is_refused_by_name(folder, kind, capsys):
  change, words = MISFITS[kind]
  with Checkpointer(folder) as ckpt:
    with pytest.raises(CheckpointError, match=words) as caught:
      ckpt.restore(change(make_state(0)))
  assert "checkpoint 2" in str(caught.value)
  assert capsys.readouterr().err == ""  # not taken for damage


@pytest.mark.parametrize(
  "leaf", ["text", None, np.array(["text"]), np.array([{}])], ids=str
)
def test_leaves_that_are_no_arrays_are_refused(tmp_path, leaf):
  with Checkpointer(tmp_path) as ckpt:
    with pytest.raises(ValueError, match="bad|nothing"):
      ckpt.save(1, {"bad": leaf})
  assert list(tmp_path.iterdir()) == []


def test_a_donated_state_is_refused(tmp_path):
  x = jnp.ones(3)
  x.delete()
  with Checkpointer(tmp_path) as ckpt:
    with pytest.raises(ValueError, match="x was donated"):
      ckpt.save(1, {"x": x})


# --- what is kept ---


def test_keeps_the_newest_and_every_nth(tmp_path):
  with Checkpointer(tmp_path, keep=2, keep_every=4) as ckpt:
    for step in range(1, 8):
      ckpt.save(step, {"x": jnp.ones(())})
    ckpt.wait()
    assert ckpt.steps() == [4, 6, 7]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "6", "7"]


def test_the_last_good_step_is_never_deleted(tmp_path):
  state = {"x": jnp.ones((64,))}
  with Checkpointer(tmp_path, keep=3) as ckpt:
    for step in (10, 20, 30):
      ckpt.save(step, state)
  flip(data_file(tmp_path / "30"))
  # A run that resumed from 20: the damaged step isn't one of the two it keeps.
  with Checkpointer(tmp_path, keep=2) as ckpt:
    assert ckpt.restore(state)[0] == 20
    ckpt.save(25, state, wait=True)
    assert ckpt.steps() == [20, 25, 30]
    assert ckpt.restore(state)[0] == 25
  # One that hasn't looked: what it writes itself is good.
  with Checkpointer(tmp_path, keep=1) as ckpt:
    ckpt.save(26, state, wait=True)
    assert 26 in ckpt.steps()
    assert ckpt.restore(state)[0] == 26


@pytest.mark.parametrize("field", ["keep", "keep_every"])
def test_nonsense_is_refused(tmp_path, field):
  with pytest.raises(ValueError, match="0"):
    Checkpointer(tmp_path, **{field: 0})
  with Checkpointer(tmp_path) as ckpt:
    with pytest.raises(ValueError, match="-1"):
      ckpt.save(-1, {"x": jnp.ones(())})


# --- other processes ---


def python(code: str, *args: object) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", code, *map(str, args)],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
  )


def test_importing_it_does_not_import_orbax():
  code = "import sys, isthmus.train.ckpt; print('orbax' in sys.modules)"
  assert python(code).communicate(timeout=120)[0].strip() == "False"


PAIR = """
import sys
import jax
rank, port, one, two, flat = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from isthmus.train.ckpt import Checkpointer, CheckpointError, restore_params
from isthmus.train.export import export_safetensors
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows, copied = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
def struct(shape, dtype, sharding):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
target = {"params": {"w": struct((8, 4), jnp.bfloat16, rows)},
          "keys": struct((8,), jax.random.key(0).dtype, rows),
          "step": struct((), jnp.int32, copied)}
with jax.set_mesh(mesh):
  with Checkpointer(one) as ckpt:  # saved by one process, the newest damaged
    step, state = ckpt.restore(target)
    assert state["params"]["w"].sharding == rows, state
    try:
      ckpt.restore({**target, "step": struct((), jnp.float32, copied)})
    except CheckpointError as error:
      assert "float32[]" in str(error)
    else:
      raise SystemExit("a misfit was not refused")
    try:
      ckpt.restore(target, 3)
    except CheckpointError as error:
      assert "SHA-256" in str(error)  # process 1 has not looked at the files
    else:
      raise SystemExit("damage was not refused")
  add = jax.jit(lambda s: {**s, "step": s["step"] + 1}, donate_argnums=0)
  with Checkpointer(two, keep=2) as ckpt:
    assert ckpt.restore(target) is None
    for i in range(step + 1, step + 4):
      state = add(state)
      ckpt.save(i, state)
    ckpt.wait()
    assert ckpt.steps() == [step + 2, step + 3], ckpt.steps()
    from isthmus.train import manifest
    def full(*args, **kwargs): raise OSError("no space")
    good, manifest.write = manifest.write, full
    ckpt.save(99, state)
    try:
      ckpt.wait()
    except CheckpointError as error:
      assert ("no space" if rank == "0" else "another process") in str(error)
    else:
      raise SystemExit("a failed write was not told")
    manifest.write = good
    assert restore_params(two)[0] == step + 3
  export_safetensors(flat, state["params"])
jax.distributed.shutdown()
print("restored", step)
"""


def test_two_processes_save_for_one_and_one_for_two(tmp_path):
  one, two, flat = tmp_path / "one", tmp_path / "two", tmp_path / "w.st"
  state = {
    "params": {"w": jnp.arange(32, dtype=jnp.bfloat16).reshape(8, 4)},
    "keys": jax.random.split(jax.random.key(1), 8),
    "step": jnp.int32(2),
  }
  with Checkpointer(one) as ckpt:
    for step in (2, 3):
      ckpt.save(step, state)
  flip(data_file(one / "3"))
  with socket.socket() as sock:
    sock.bind(("localhost", 0))
    port = sock.getsockname()[1]
  children = [python(PAIR, i, port, one, two, flat) for i in range(2)]
  try:
    told = [c.communicate(timeout=150)[0] for c in children]
  finally:
    for child in children:
      child.kill()
  assert [c.returncode for c in children] == [0, 0]
  assert all("restored 2" in text for text in told)
  with Checkpointer(two) as ckpt:
    step, back = ckpt.restore(target_on(make_mesh(2), state))
  assert step == 5
  assert_same(back, {**state, "step": jnp.int32(5)})
  np.testing.assert_array_equal(
    load_safetensors(flat)["w"], state["params"]["w"]
  )
