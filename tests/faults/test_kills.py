"""kill -9 at random moments: one process, two, and a checkpointer alone.

Fault: SIGKILL to a run, to both or to one of the two processes of a run, or
to a process that does nothing but save; saves are in flight.
Promised: no finished checkpoint is lost or wrong; the same command goes on
from it, and the finished run is bit for bit (two processes: but for the order
of their sums) as if nothing had happened, each record there once. A process
whose partner is gone ends by itself, with a message and not with 0: at once
where it waits for numbers, within jax's heartbeat timeout, 100 s, where it
waits for the others to have saved.
"""

import collections
import functools
import os
import random
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train import steps
from isthmus.train.ckpt import Checkpointer
from tests.faults.runs import reached, same_run, start
from tests.train import pair as two
from tests.train.child import TOY, Child

pytestmark = pytest.mark.process


def _trusted(workdir, *, past, every):
  """The newest step in the folder; none is damaged, and none was lost.

  A record of step `past` says that the save before the last one that was due
  had ended: a save waits for the one before it.
  """
  if not (workdir / "ckpt").is_dir():
    assert past <= every
    return 0
  found, damaged = steps.find(workdir / "ckpt", None)
  assert not damaged
  due = (past - 1) // every * every
  assert (found or 0) >= due - every
  return found or 0


# --- one process ---


def _killed(folder, *, kills, steps, save_every, seed):
  """Kills a run at random moments, each time after it has gone further.

  Returns the folder and how many of the kills fell into a save.
  """
  workdir = folder / f"killed{seed}"
  more = ["--set", f"steps={steps}", "--set", f"save_every={save_every}"]
  more += ["--set", "data.pause=0.01"]
  random_ = random.Random(seed)
  cut = found = 0
  log = workdir / "metrics.jsonl"
  for moment in sorted(random_.sample(range(1, steps - 1), kills)):
    before = log.stat().st_ino if log.exists() else None
    child = start(workdir, folder, *more)
    child.until(functools.partial(reached, log, moment, before))
    # A step takes 10 ms and a save about 50.
    time.sleep(random_.uniform(0, 0.06))
    child.kill()
    cut += any((workdir / "ckpt").glob("*.pending"))
    newest = _trusted(workdir, past=moment, every=save_every)
    assert newest >= found
    found = newest
  child = start(workdir, folder, *more)
  assert child.wait() == 0, child.err
  assert f"resuming at step {found}" in child.err or cut
  return workdir, cut


def test_killed_three_times_is_as_never_killed(tmp_path, uninterrupted):
  workdir, _ = _killed(tmp_path, kills=3, steps=48, save_every=2, seed=1)
  same_run(workdir, uninterrupted(48), steps=48)


@pytest.mark.slow
def test_killed_twenty_five_times(tmp_path, uninterrupted):
  cut = 0
  for seed in range(5):
    every = 1 + seed % 2
    workdir, more = _killed(
      tmp_path, kills=5, steps=48, save_every=every, seed=seed
    )
    same_run(workdir, uninterrupted(48), steps=48)
    cut += more
  print(f"{cut} of 25 kills cut a save off")
  assert cut


# --- two processes ---


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """What a pair's run comes to, of one process with its devices: by steps."""
  folder = tmp_path_factory.mktemp("pair")

  def get(steps):
    workdir = folder / str(steps)
    argv = ["--config", f"{TOY}:all", "--workdir", workdir]
    argv += ["--set", f"steps={steps}"]
    child = Child(*argv, folder=folder, devices=4)
    assert child.wait() == 0, child.err
    return workdir

  return functools.cache(get)


def _orphan(child, patience):
  """How a process ended whose partner was killed."""
  child.process.join(patience)
  if child.process.exitcode is None:
    child.kill()
    return "still waited for a save, and was killed"
  assert child.process.exitcode != 0
  ours = [x for x in child.err.splitlines() if x.startswith("isthmus:")]
  if ours:
    assert "Traceback" not in child.err, child.err
    assert len(ours) == 1, child.err
    assert "lost the others" in ours[0] or "not written" in ours[0], ours
    return "ended with our message"
  assert "another task died" in child.err, child.err
  return "was ended by jax, with its message"


def _killed_pairs(folder, victims, *, steps, seed, patience):
  """Kills the pair, or one of it, each time after it has gone further."""
  workdir = folder / "run"
  more = ["--set", f"steps={steps}", "--set", "data.pause=0.03"]
  random_ = random.Random(seed)
  ends = collections.Counter()
  log, found = workdir / "metrics.jsonl", 0
  moments = sorted(random_.sample(range(1, steps - 2), len(victims)))
  for moment, victim in zip(moments, victims, strict=True):
    before = log.stat().st_ino if log.exists() else None
    children = two.start(workdir, folder, *more)
    children[0].until(functools.partial(reached, log, moment, before))
    time.sleep(random_.uniform(0, 0.15))
    if victim == "both":
      for child in children:
        child.send(signal.SIGKILL)
      for child in children:
        assert child.wait() == -signal.SIGKILL
    else:
      children[victim].kill()
      ends[_orphan(children[1 - victim], patience)] += 1
    newest = _trusted(workdir, past=moment, every=2)
    assert newest >= found
    found = newest
  two.end(two.start(workdir, folder, *more))
  return workdir, ends


def test_a_pair_is_killed_twice(tmp_path, pair):
  workdir, ends = _killed_pairs(
    tmp_path, ["both", 0], steps=16, seed=0, patience=60
  )
  assert list(ends) != ["still waited for a save, and was killed"]
  two.same(workdir, pair(16), 16)


@pytest.mark.slow
def test_a_pair_is_killed_twenty_five_times(tmp_path, pair):
  random_ = random.Random(0)
  victims = [random_.choice(["both", 0, 1]) for _ in range(25)]
  workdir, ends = _killed_pairs(
    tmp_path, victims, steps=64, seed=0, patience=15
  )
  print(dict(collections.Counter(map(str, victims))), dict(ends))
  two.same(workdir, pair(64), 64)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_nobody_waits_for_ever(tmp_path, victim):
  _, ends = _killed_pairs(
    tmp_path, [victim], steps=16, seed=victim, patience=150
  )
  assert "still waited for a save, and was killed" not in ends


# --- a checkpointer alone ---

SAVER = """
import itertools, sys
import jax, jax.numpy as jnp
from isthmus.train.ckpt import Checkpointer
step = jax.jit(lambda s: {"n": s["n"] + 1, "x": s["x"] + 1}, donate_argnums=0)
state = {"n": jnp.int32(0), "x": jnp.zeros((int(sys.argv[2]), 1 << 16))}
with Checkpointer(sys.argv[1], keep=2) as ckpt:
  found = ckpt.restore(state)
  done, state = (0, state) if found is None else found
  for i in itertools.count(done + 1):
    state = step(state)
    ckpt.save(i, state)
    print(i - 1, flush=True)  # this one is on the disk
"""


def _kill_and_restore(folder, moments):
  """Kills a saving process again and again; it resumes from what is there."""
  target = {"n": jnp.int32(0), "x": jnp.zeros((8, 1 << 16))}
  got = 0
  for moment in moments:
    child = subprocess.Popen(
      [sys.executable, "-c", SAVER, str(folder), "8"],
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert child.stdout
    child.stdout.readline()
    time.sleep(moment)
    child.send_signal(signal.SIGKILL)
    lines = child.communicate(timeout=60)[0].split()
    assert child.returncode == -signal.SIGKILL
    known = max([got, *map(int, lines)])
    with Checkpointer(folder) as ckpt:
      found = ckpt.restore(target)
    if found is None:
      assert known == 0
      continue
    got, state = found
    assert got >= known
    assert int(state["n"]) == got
    np.testing.assert_array_equal(state["x"], np.full((8, 1 << 16), got))
    names = {p.name for p in folder.iterdir()}
    assert all(name.isdecimal() for name in names), names
  assert got > 0


def test_a_saver_killed_twice(tmp_path):
  _kill_and_restore(tmp_path, [0.3, 0.45])


@pytest.mark.slow
def test_a_saver_killed_twenty_five_times(tmp_path):
  moments = np.random.default_rng(0).uniform(0, 0.6, 25).tolist()
  _kill_and_restore(tmp_path, moments)
