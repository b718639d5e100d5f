"""What Orbax writes comes back; a write that fails leaves no thread behind."""

import asyncio
import threading
import time

import jax.numpy as jnp
import numpy as np

from isthmus.train import arrays


def _tree(size=4):
  return {"a": {f"w{i}": jnp.full((size, 3), i) for i in range(8)}}


def _templates(tree):
  return {("a", name): np.empty(x.shape, x.dtype) for name, x in tree.items()}


def test_what_is_written_is_read(tmp_path):
  tree = _tree()
  arrays.write(tmp_path / "x", tree).result()
  templates = _templates(tree["a"])
  templates["a", "w3"] = None  # left out
  back = arrays.read(tmp_path / "x", templates)["a"]
  for name, x in tree["a"].items():
    if name != "w3":
      np.testing.assert_array_equal(back[name], x)


def test_either_name_of_the_orbax_api_will_do(monkeypatch, tmp_path):
  import orbax.checkpoint

  monkeypatch.delattr(orbax.checkpoint, "v1", raising=False)
  assert arrays._orbax().save_async
  arrays.write(tmp_path / "x", _tree()).result()
  assert arrays.read(tmp_path / "x", _templates(_tree()["a"]))


def test_a_clock_that_jumps_is_no_timeout(monkeypatch, tmp_path):
  """Orbax's deadlines are times of day."""
  now, count = time.time, iter(range(10**6))

  def jumps():
    return now() + (next(count) % 3) * 365 * 24 * 3600

  monkeypatch.setattr(time, "time", jumps)
  arrays.write(tmp_path / "x", _tree()).result()
  assert next(count) > 10  # it was asked
  assert arrays.read(tmp_path / "x", _templates(_tree()["a"]))


def test_no_thread_is_left_waiting():
  """As it is where one array's error leaves the others' threads."""
  from orbax.checkpoint._src.futures import future

  async def wait():
    await asyncio.Event().wait()

  thread = future.CommitFuture(wait(), name="stuck")._t
  thread_ends = time.monotonic() + 20
  while not hasattr(thread, "main_task"):  # its loop is about to run
    assert time.monotonic() < thread_ends
    time.sleep(0.001)
  assert thread.is_alive()
  arrays.give_up()
  threading.Thread.join(thread, 5)
  assert not thread.is_alive()
