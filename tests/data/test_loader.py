"""Batches: functions of (seed, step), whoever loads them and whenever."""

import gc
import socket
import subprocess
import sys
import threading
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from isthmus.data import loader
from isthmus.data.loader import Loader, stack
from isthmus.data.prefetch import prefetch
from isthmus.data.source import ArraySource


class Items:
  """A source without fast paths; counts what is read."""

  def __init__(self, n, broken=None):
    self.n, self.broken, self.read = n, broken, Counter()

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    assert type(i) is int
    if i == self.broken:
      raise OSError(f"cannot read {i}")
    self.read[i] += 1
    return {"x": np.full(3, i, np.float32), "i": np.asarray(i, np.int32)}


class Listed(Items):
  def __getitems__(self, indices):
    return [self[i] for i in indices]


def arrays(n):
  i = np.arange(n, dtype=np.int32)
  return ArraySource({"x": np.repeat(i[:, None], 3, 1).astype("f4"), "i": i})


def jitter(example, rng):
  return {**example, "x": example["x"] + rng.normal(size=3).astype("f4")}


def mesh_of(**axes):
  return jax.make_mesh(
    tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
  )


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))


# -- the order --


@pytest.mark.parametrize("n,batch", [(10, 4), (7, 7), (3, 8), (1, 5)])
def test_every_epoch_holds_every_example_once(n, batch):
  loader = Loader(Items(n), batch_size=batch, seed=2)
  order = np.concatenate([loader.indices(s) for s in range(3 * n)])
  assert order.dtype == np.int64
  epochs = order[: len(order) // n * n].reshape(-1, n)
  assert len(epochs) >= 3
  assert (np.sort(epochs, axis=1) == np.arange(n)).all()
  if n > 3:
    assert len({tuple(e) for e in epochs.tolist()}) > 1  # reshuffled


def test_without_shuffle_the_order_is_the_sources():
  loader = Loader(Items(3), batch_size=4, seed=2, shuffle=False)
  assert loader.indices(0).tolist() == [0, 1, 2, 0]
  assert loader.indices(1).tolist() == [1, 2, 0, 1]


def test_seed_changes_the_order():
  a, b = (Loader(Items(50), batch_size=50, seed=s) for s in (0, 1))
  assert a.indices(0).tolist() != b.indices(0).tolist()


def test_batch_is_independent_of_history():
  loader = Loader(Items(11), batch_size=4, seed=3, transform=jitter)
  straight = [loader.host_batch(s) for s in range(9)]
  again = Loader(Items(11), batch_size=4, seed=3, transform=jitter)
  for step in (8, 0, 5, 5):
    same(again.host_batch(step), straight[step])
  assert not np.array_equal(straight[0]["x"], straight[3]["x"])


def test_transform_varies_by_epoch_and_index_only():
  loader = Loader(
    arrays(4), batch_size=4, seed=3, shuffle=False, transform=jitter
  )
  noise = [loader.host_batch(s)["x"] - loader.host_batch(s)["i"][:, None]
           for s in (0, 1)]  # fmt: skip
  assert not np.allclose(noise[0], noise[1])
  assert len(np.unique(noise[0].round(4))) == 12
  # Another batch size cuts the same rows differently.
  whole = Loader(
    arrays(4), batch_size=8, seed=3, shuffle=False, transform=jitter
  ).host_batch(0)["x"]
  parts = [loader.host_batch(s)["x"] for s in (0, 1)]
  np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("transform", [None, jitter])
@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("make", [Items, Listed, arrays])
def test_fast_paths_and_threads_give_the_same_batch(make, threads, transform):
  plain = Loader(Items(20), batch_size=8, seed=1, transform=transform)
  loader = Loader(
    make(20), batch_size=8, seed=1, transform=transform, threads=threads
  )
  same(loader.host_batch(4), plain.host_batch(4))


@pytest.mark.parametrize(
  "rows", [slice(2, 5), slice(None, None, 2), np.array([7, 0, 3]), [1], None]
)
def test_rows_of_a_batch_are_loaded_alone(rows):
  source = Items(40)
  loader = Loader(source, batch_size=8, seed=1, transform=jitter)
  whole = loader.host_batch(2)
  source.read.clear()
  part = loader.host_batch(2, rows=rows)
  select = slice(None) if rows is None else rows
  same(part, {name: array[select] for name, array in whole.items()})
  assert sum(source.read.values()) == len(part["i"])


# -- sharding --


@pytest.mark.parametrize(
  "axes,spec",
  [
    ({"data": 8}, PartitionSpec("data")),
    ({"data": 4, "fsdp": 2}, PartitionSpec(("data", "fsdp"))),
    ({"data": 4, "fsdp": 2}, PartitionSpec(("fsdp", "data"))),
    ({"data": 2, "model": 4}, PartitionSpec("data")),
    ({"data": 2, "model": 4}, PartitionSpec("data", None)),
    ({"data": 8}, PartitionSpec()),
  ],
)
def test_sharded_batch_equals_the_host_batch(axes, spec):
  sharding = NamedSharding(mesh_of(**axes), spec)
  loader = Loader(arrays(20), batch_size=8, seed=1, sharding=sharding)
  batch, host = loader.batch(3), loader.host_batch(3)
  same(batch, host)
  for name, array in batch.items():
    assert array.shape == host[name].shape
    assert len(array.addressable_shards) == 8
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, host[name][shard.index])
  shards = np.prod([axes[a] for a in _names(spec)], dtype=int)
  assert batch["x"].addressable_shards[0].data.shape == (8 // shards, 3)


def _names(spec):
  first = spec[0] if len(spec) else None
  return () if first is None else first if type(first) is tuple else (first,)


class TwoHosts(NamedSharding):
  """Answers as if this process had every other device of the mesh."""

  def addressable_devices_indices_map(self, global_shape):
    indices = self.devices_indices_map(global_shape)
    return {d: i for d, i in indices.items() if d.id % 2 == 0}


@pytest.mark.parametrize(
  "axes,spec,held",
  [
    ({"data": 8}, PartitionSpec("data"), [0, 2, 4, 6]),
    ({"data": 4, "model": 2}, PartitionSpec("data"), list(range(8))),
    ({"model": 2, "data": 4}, PartitionSpec("data"), [0, 1, 4, 5]),
  ],
)
def test_a_process_loads_the_rows_of_its_devices_only(
  axes, spec, held, monkeypatch
):
  # Interleaved devices: rows that are not consecutive, replicated rows once.
  source = Items(100)
  sharding = TwoHosts(mesh_of(**axes), spec)
  loader = Loader(source, batch_size=8, seed=1, sharding=sharding)
  assert loader._own_rows.tolist() == held
  expected = Loader(Items(100), batch_size=8, seed=1).host_batch(5)
  host = loader.host_batch(5, rows=loader._own_rows)
  assert sum(source.read.values()) == len(held)
  same(host, {name: array[held] for name, array in expected.items()})
  # And hands each device its own.
  placed = []

  def assemble(shape, sharding, parts):
    placed.append(parts)
    return parts[0]

  monkeypatch.setattr(jax, "make_array_from_single_device_arrays", assemble)
  names, shape = list(loader.batch(5)), expected["x"].shape
  parts = placed[names.index("x")]
  shards = sharding.addressable_devices_indices_map(shape)
  for part, (device, index) in zip(parts, shards.items(), strict=True):
    assert part.devices() == {device}
    np.testing.assert_array_equal(part, expected["x"][index])


def test_batch_size_must_divide_over_the_sharded_axes():
  mesh = mesh_of(data=4, fsdp=2)
  sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  with pytest.raises(ValueError, match="batch_size 12 .* 8"):
    Loader(Items(5), batch_size=12, seed=0, sharding=sharding)
  Loader(
    Items(5),
    batch_size=12,
    seed=0,
    sharding=NamedSharding(mesh, PartitionSpec("data")),
  )


def test_only_the_leading_axis_may_be_sharded():
  sharding = NamedSharding(mesh_of(data=4, fsdp=2), PartitionSpec(None, "data"))
  with pytest.raises(ValueError, match="leading axis only"):
    Loader(Items(5), batch_size=8, seed=0, sharding=sharding)


# -- the thread --


@pytest.mark.parametrize("start", [0, 1, 6])
def test_iterate_resumes_at_any_step_in_order(start):
  loader = Loader(Items(11), batch_size=4, seed=3, transform=jitter)
  steps = []
  for step, batch in loader.iterate(start, 9):
    steps.append(step)
    same(batch, loader.host_batch(step))
  assert steps == list(range(start, 9))


def _workers():
  return [t for t in threading.enumerate() if t.name == "isthmus-batches"]


@pytest.mark.parametrize("end", ["close", "collect", "exhaust", "unstarted"])
def test_no_thread_is_left_behind(end):
  assert not _workers()
  loader = Loader(Items(11), batch_size=4, seed=3)
  batches = loader.iterate(0, 3 if end == "exhaust" else None)
  if end != "unstarted":
    next(batches)
    assert len(_workers()) == 1
  if end == "close":
    batches.close()
  elif end == "exhaust":
    assert len(list(batches)) == 2
  del batches
  gc.collect()
  assert not _workers()


def test_a_pass_that_is_broken_off_leaves_no_thread(monkeypatch):
  inner = []  # a reference, so that collection cannot do the closing

  def keep(*args, **kwargs):
    inner.append(prefetch(*args, **kwargs))
    return inner[-1]

  monkeypatch.setattr("isthmus.data.loader.prefetch", keep)
  batches = Loader(Items(50), batch_size=4, seed=3).once()
  next(batches)
  assert len(_workers()) == 1
  batches.close()
  assert not _workers()


def test_error_in_the_thread_reaches_the_consumer_with_its_step():
  source = Items(20, broken=13)
  loader = Loader(source, batch_size=4, seed=0, shuffle=False)
  seen = []
  with pytest.raises(OSError, match="cannot read 13") as caught:
    for step, _ in loader.iterate(0):
      seen.append(step)
  assert seen == [0, 1, 2]
  assert caught.value.__notes__ == ["raised by the data loader at step 3"]
  assert not _workers()


def test_batches_are_made_under_a_transfer_guard():
  sharding = NamedSharding(mesh_of(data=8), PartitionSpec("data"))
  jax.config.update("jax_transfer_guard", "disallow")
  try:
    for s in (sharding, None):
      loader = Loader(arrays(9), batch_size=8, seed=0, sharding=s)
      assert [step for step, _ in loader.iterate(0, 3)] == [0, 1, 2]
  finally:
    jax.config.update("jax_transfer_guard", None)


# -- a pass --


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("n", [1, 8, 9, 21])
def test_once_covers_a_source_exactly(n, shuffle):
  sharding = NamedSharding(mesh_of(data=4, fsdp=2), PartitionSpec("data"))
  loader = Loader(
    arrays(n), batch_size=8, seed=0, shuffle=shuffle, sharding=sharding
  )
  seen, total = [], 0.0
  for batch in loader.once():
    assert batch["x"].shape == (8, 3) and batch["valid"].shape == (8,)
    assert batch["valid"].dtype == np.float32
    valid = np.asarray(batch["valid"])
    seen += np.asarray(batch["i"])[valid > 0].tolist()
    total += float(batch["x"][:, 0] @ batch["valid"])
  assert sorted(seen) == list(range(n))
  assert (seen == list(range(n))) == (not shuffle or n == 1)
  assert total == n * (n - 1) / 2
  assert loader.num_batches == -(-n // 8)


def test_once_refuses_a_source_with_a_field_of_its_masks_name():
  source = ArraySource({"valid": np.ones(4)})
  with pytest.raises(ValueError, match="'valid'.*rename"):
    next(Loader(source, batch_size=2, seed=0).once())


# -- refusals --


@pytest.mark.parametrize(
  "field,value", [("batch_size", 0), ("seed", -1), ("prefetch", 0)]
)
def test_numbers_out_of_range_are_refused(field, value):
  settings = {"batch_size": 2, "seed": 0, field: value}
  with pytest.raises(ValueError, match=f"{field} is {value}"):
    Loader(Items(3), **settings)


def test_empty_source_and_negative_steps_are_refused():
  with pytest.raises(ValueError, match="0 examples"):
    Loader(Items(0), batch_size=2, seed=0)
  loader = Loader(Items(3), batch_size=2, seed=0)
  for call in (loader.indices, loader.host_batch, loader.batch, loader.iterate):
    with pytest.raises(ValueError, match="is -1"):
      call(-1)


def test_ragged_examples_name_field_index_and_shapes():
  examples = [{"x": np.zeros((2, 3))}, {"x": np.zeros((2, 4))}]
  with pytest.raises(
    ValueError, match=r"'x': example 9 has shape \(2, 4\), example 7 .*\(2, 3\)"
  ):
    stack(examples, np.array([7, 9]))
  with pytest.raises(ValueError, match="'x'.*dtype int32.*dtype|dtype.*int32"):
    stack([{"x": np.zeros(2)}, {"x": np.zeros(2, np.int32)}], np.arange(2))
  with pytest.raises(ValueError, match=r"example 1 has fields \['y'\]"):
    stack([{"x": np.zeros(2)}, {"y": np.zeros(2)}], np.arange(2))


def test_text_stays_on_the_host():
  class Names(Items):
    def __getitem__(self, i):
      return {"name": b"\0" * i}

  loader = Loader(Names(4), batch_size=4, seed=0, shuffle=False)
  names = loader.host_batch(0)["name"]
  assert names.tolist() == [b"", b"\0", b"\0\0", b"\0\0\0"]
  with pytest.raises(ValueError, match="'name' has dtype object.*transform"):
    loader.batch(0)


def test_integers_that_would_wrap_on_the_device_are_refused():
  fits = ArraySource({"i": np.array([2**31 - 1, -(2**31)], np.int64)})
  batch = Loader(fits, batch_size=2, seed=0, shuffle=False).batch(0)
  assert np.asarray(batch["i"]).tolist() == [2**31 - 1, -(2**31)]
  wraps = ArraySource({"i": np.array([2**31], np.int64)})
  with pytest.raises(ValueError, match="'i' spans.*2147483648"):
    Loader(wraps, batch_size=1, seed=0).batch(0)


def test_a_take_of_the_wrong_length_is_named():
  class Short(Items):
    def take(self, indices):
      return {"x": np.zeros((len(indices) - 1, 2))}

  with pytest.raises(ValueError, match=r"'x': take\(4 indices\).*\(3, 2\)"):
    Loader(Short(9), batch_size=4, seed=0).host_batch(0)


# -- several processes --

WORKER = """
import sys
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from isthmus.data.loader import Loader
from tests.data.test_loader import Items, jitter

auto = (AxisType.Auto,) * 2
for shape, held in (((4, 1), 4), ((1, 4), 8), ((2, 2), 4)):
  mesh = jax.make_mesh(shape, ("data", "model"), axis_types=auto)
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  source = Items(11)
  settings = dict(batch_size=8, seed=3, transform=jitter)
  loader = Loader(source, sharding=sharding, **settings)
  alone = Loader(Items(11), **settings)
  for step, batch in loader.iterate(2, 5):
    for name, array in alone.host_batch(step).items():
      whole = multihost_utils.process_allgather(batch[name], tiled=True)
      np.testing.assert_array_equal(whole, array)
  assert sum(source.read.values()) == 3 * held, source.read
  valid = [b["valid"] for b in loader.once()]
  total = sum(float(jax.jit(lambda v: v.sum())(v)) for v in valid)
  assert total == 11
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_see_the_batch_that_one_sees():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  workers = [
    subprocess.Popen([sys.executable, "-c", WORKER, str(i), str(port)])
    for i in range(2)
  ]
  assert [worker.wait(180) for worker in workers] == [0, 0]


def test_an_order_that_is_kept_is_the_one_that_is_not(monkeypatch):
  """Batches that lie in one epoch, and that straddle two or three."""
  source = ArraySource({"x": np.arange(10)})
  loaders = [Loader(source, batch_size=size, seed=3) for size in (3, 24)]
  kept = [[x.indices(s) for s in range(12)] for x in loaders]
  monkeypatch.setattr(loader, "_KEPT", 0)
  for mine, again in zip(loaders, kept, strict=True):
    for step, indices in enumerate(again):
      np.testing.assert_array_equal(mine.indices(step), indices)
  assert not np.array_equal(kept[0][0], kept[0][1])
