"""Two processes train as one: gloo between them, one folder, one log.

They are started by hand, and by what docs/hosts.md says to SLURM and to
Kubernetes, with stand-ins for both.
"""

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from isthmus.train.ckpt import restore_params
from isthmus.train.config import ConfigError
from isthmus.train.hosts import slurm_devices
from tests.train import pair as two
from tests.train.child import TOY, Child

STEPS = 16
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "hosts.md"
NODE = {"SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "8"}


def test_tasks_share_the_gpus_of_their_node():
  share = lambda **more: slurm_devices({**NODE, **more})
  assert share(SLURM_STEP_TASKS_PER_NODE="1") == list(range(8))
  assert share(SLURM_STEP_TASKS_PER_NODE="8(x2)") == [1]
  assert share(SLURM_STEP_TASKS_PER_NODE="2") == [4, 5, 6, 7]
  # The second node has two tasks, the third and fourth one each.
  nodes = {"SLURM_STEP_TASKS_PER_NODE": "8,2,1(x2)"}
  assert share(**nodes) == [1]
  assert share(**nodes, SLURM_NODEID="1") == [4, 5, 6, 7]
  assert share(**nodes, SLURM_NODEID="3", SLURM_LOCALID="0") == list(range(8))


def test_gpus_that_slurm_has_divided_are_not_divided_again():
  tasks = {**NODE, "SLURM_STEP_TASKS_PER_NODE": "4"}
  assert slurm_devices({**tasks, "CUDA_VISIBLE_DEVICES": "2,3"}) == [0, 1]
  eight = ",".join(map(str, range(8)))
  assert slurm_devices({**tasks, "CUDA_VISIBLE_DEVICES": eight}) == [2, 3]
  # Without a count of the node's, what is shown is all there is.
  del tasks["SLURM_GPUS_ON_NODE"]
  assert slurm_devices({**tasks, "CUDA_VISIBLE_DEVICES": eight}) == [2, 3]


def test_what_is_left_to_jax():
  assert slurm_devices({}) is None
  assert slurm_devices({"CUDA_VISIBLE_DEVICES": "0,1"}) is None
  assert slurm_devices({"SLURM_LOCALID": "0"}) is None  # no GPU that is known
  assert slurm_devices({**NODE, "JAX_LOCAL_DEVICE_IDS": "3"}) is None


def test_gpus_that_tasks_cannot_share_are_refused():
  three = {**NODE, "SLURM_STEP_TASKS_PER_NODE": "3"}
  with pytest.raises(ConfigError, match="3 tasks on a node .* 8 GPUs"):
    slurm_devices(three)


@pytest.mark.process
def test_no_cluster_is_said_in_a_line(tmp_path):
  child = Child("--distributed", folder=tmp_path)
  assert child.wait() == 2
  assert "finds no cluster" in child.err and "--coordinator" in child.err


def _cut(workdir, folder):
  """A copy of a finished run as it was two steps before its end."""
  shutil.copytree(workdir, folder)
  shutil.rmtree(folder / "ckpt" / str(STEPS))
  return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The toy on four devices: of one process, and of two."""
  folder = tmp_path_factory.mktemp("runs")
  argv = ["--config", f"{TOY}:all", "--workdir", folder / "one"]
  alone = Child(*argv, folder=folder, devices=4)
  pair = two.end(two.start(folder / "two", folder))
  assert alone.wait() == 0, alone.err
  assert "4 x cpu" in alone.err and "4 x cpu" in pair[0].err
  # The first process speaks; the other has nothing to add.
  assert "loss curve" in pair[0].err and "eval/loss" in pair[0].out
  said = pair[1].out.splitlines()
  assert not [x for x in said if not x.startswith("[Gloo]")], said
  for word in ("train", "starting", "loss", "warning"):
    assert word not in pair[1].err, pair[1].err
  return folder


@pytest.mark.process
def test_two_processes_train_as_one(runs):
  two.same(runs / "two", runs / "one", STEPS)
  assert len(list((runs / "two" / "tensorboard").iterdir())) == 1
  # The first process reports on the whole of parameters that two hold.
  norms = [
    json.loads((runs / n / "results.json").read_text())["norm"]
    for n in ("one", "two")
  ]
  assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0.1


@pytest.mark.process
def test_saved_by_one_and_resumed_by_two(runs, tmp_path):
  folder = _cut(runs / "one", tmp_path / "run")
  first, _ = two.end(two.start(folder, tmp_path))
  assert "resuming at step 14" in first.err
  two.same(folder, runs / "one", STEPS)


@pytest.mark.process
def test_saved_by_two_and_resumed_by_one(runs, tmp_path):
  folder = _cut(runs / "two", tmp_path / "run")
  argv = ["--config", f"{TOY}:all", "--workdir", folder]
  child = Child(*argv, folder=tmp_path, devices=4)
  assert child.wait() == 0, child.err
  assert "resuming at step 14" in child.err
  two.same(folder, runs / "one", STEPS)


@pytest.mark.process
def test_stopped_by_sigterm_to_one_then_killed_then_finished(runs, tmp_path):
  workdir = tmp_path / "run"
  start = functools.partial(
    two.start, workdir, tmp_path, "--set", "data.pause=0.05"
  )
  pair = start()
  pair[0].until(functools.partial(two.beyond, workdir, 2))
  pair[1].send(signal.SIGTERM)
  two.end(pair)
  stopped, _ = restore_params(workdir / "ckpt")
  assert 2 < stopped < STEPS
  assert f"stopped at step {stopped}, saved" in pair[0].err
  assert "stopped" not in pair[1].err
  assert two.last(workdir) == stopped

  pair = start()
  pair[0].until(functools.partial(two.beyond, workdir, stopped + 2))
  for child in pair:
    child.kill()

  first, _ = two.end(start())
  assert "resuming at step" in first.err
  two.same(workdir, runs / "one", STEPS)


# --- docs/hosts.md ---

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=localhost
export SLURM_STEP_TASKS_PER_NODE="1(x2)" SLURM_LOCALID=0
for i in 0 1; do
  SLURM_PROCID=$i SLURM_NODEID=$i "$@" &
  echo $! > "$SAID/task$i"
done
worst=0
for i in 0 1; do
  wait $(< "$SAID/task$i") || worst=$?
done
exit $worst
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SAID/queue"
"""
ISTHMUS = """#!/bin/bash
exec {python} -m isthmus.train.main "$@"
"""


def _block(language, workdir):
  """A block of the page, for the toy at leisure, in a folder of its own."""
  found = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.S)
  assert len(found) == 1
  text = found[0]
  for old, new in (
    ("quickstart:full", f"{TOY}:all --set data.pause=0.2"),
    ("--set mesh.fsdp=16", "--set mesh.fsdp=4"),
    ("/shared/runs/lm", str(workdir)),
  ):
    assert old in text, old
    text = text.replace(old, new)
  return text


@pytest.fixture
def machine(tmp_path):
  """Variables of a node whose programs are stand-ins, with two CPU devices."""
  for name, text in (
    ("srun", SRUN),
    ("scontrol", SCONTROL),
    ("isthmus", ISTHMUS.format(python=sys.executable)),
  ):
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  return {
    **{k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
    "PATH": f"{tmp_path}:{os.environ['PATH']}",
    "SAID": str(tmp_path),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "2",
  }


class Script:
  """A script that runs, and what it and its children say."""

  def __init__(self, argv, log, machine, **variables):
    self.log = log
    with log.open("w") as out:
      self.process = subprocess.Popen(
        argv, stdout=out, stderr=out, env={**machine, **variables}
      )

  def until_step(self, step, workdir):
    ends = time.monotonic() + 300
    while not two.beyond(workdir, step):
      assert self.process.poll() is None, self.log.read_text()
      assert time.monotonic() < ends, self.log.read_text()
      time.sleep(0.01)

  def end(self, status):
    try:
      assert self.process.wait(300) == status, self.log.read_text()
    finally:
      self.process.kill()
    return self.log.read_text()


@pytest.mark.once
@pytest.mark.process
def test_the_script_for_slurm_is_queued_again_until_it_has_ended(
  runs, tmp_path, machine
):
  workdir, script = tmp_path / "run", tmp_path / "job.sh"
  script.write_text(_block("bash", workdir))
  job = {"SLURM_JOB_ID": str(_job_of_a_free_port())}

  first = Script(["bash", script], tmp_path / "log", machine, **job)
  first.until_step(2, workdir)
  os.kill(int((tmp_path / "task1").read_text()), signal.SIGTERM)
  assert "saved; the same command goes on" in first.end(0)
  queue = tmp_path / "queue"
  assert queue.read_text() == f"requeue {job['SLURM_JOB_ID']}\n"

  second = Script(["bash", script], tmp_path / "log2", machine, **job)
  assert "resuming at step" in second.end(0)
  two.same(workdir, runs / "one", STEPS)
  assert len(queue.read_text().splitlines()) == 1

  # What can't be mended by starting again is not started again.
  script.write_text(script.read_text().replace("mesh.fsdp", "mesh.fdsp"))
  third = Script(["bash", script], tmp_path / "log3", machine, **job)
  assert "did you mean 'fsdp'" in third.end(2)
  assert len(queue.read_text().splitlines()) == 1


def _job_of_a_free_port():
  """jax makes the port of the job's number."""
  for number in range(os.getpid() % 4096, 4096):
    with socket.socket() as s:
      try:
        s.bind(("localhost", 61440 + number))
      except OSError:
        continue
      return number
  raise OSError("no port is free")


@pytest.mark.once
@pytest.mark.process
def test_pods_of_kubernetes_end_well_when_the_run_has_ended(
  runs, tmp_path, machine
):
  workdir = tmp_path / "run"
  service, job = yaml.safe_load_all(_block("yaml", workdir))
  spec = job["spec"]["template"]["spec"]
  (container,) = spec["containers"]
  script = container["command"][2]
  # The pods find the first of them, and are as many as the processes.
  first = f"{job['metadata']['name']}-0.{spec['subdomain']}:9911"
  assert spec["subdomain"] == service["metadata"]["name"] and first in script
  assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
  assert f"--processes {job['spec']['completions']} " in script

  def pods(name):
    command = script.replace(first, f"localhost:{two.port()}")
    argv = [*container["command"][:2], command]
    return [
      Script(
        argv, tmp_path / f"{name}{i}", machine, JOB_COMPLETION_INDEX=str(i)
      )
      for i in range(2)
    ]

  evicted = pods("evicted")
  evicted[0].until_step(2, workdir)
  evicted[1].process.send_signal(signal.SIGTERM)
  assert "saved; the same command goes on" in evicted[0].end(1)
  evicted[1].end(1)  # neither is done, though both were stopped in order

  said = [pod.end(0) for pod in pods("again")]
  assert "resuming at step" in said[0]
  two.same(workdir, runs / "one", STEPS)
