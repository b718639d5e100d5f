"""Joining the other processes of a run, and the GPUs that each one takes."""

import os
import re
from collections.abc import Mapping
from typing import Any

from isthmus.train.config import ConfigError

#: Seconds of silence after which a process counts as dead and the others end.
HEARTBEAT = 40


def join(coordinator: str, processes: int, process: int) -> None:
  """Joins a run whose processes are told where they meet.

  Every device that the process sees is its own; `CUDA_VISIBLE_DEVICES` divides
  a machine's GPUs among several. A cluster's own variables are not looked at.

  Args:
    coordinator: host:port of process 0.
    processes: how many there are.
    process: which one this is, from 0.

  Raises:
    ConfigError: arguments that can't be, or no answer.

  Example:
    >>> join("node001", 2, 0)
    Traceback (most recent call last):
      ...
    isthmus.train.config.ConfigError: --coordinator node001: not HOST:PORT
  """
  host, colon, port = coordinator.rpartition(":")
  if not (host and colon and port.isdecimal()):
    raise ConfigError(f"--coordinator {coordinator}: not HOST:PORT")
  if not 0 <= process < processes:
    raise ConfigError(
      f"--process {process} of --processes {processes}: they are counted from 0"
    )
  _initialize(
    coordinator_address=coordinator,
    num_processes=processes,
    process_id=process,
    cluster_detection_method="deactivate",
  )


def join_cluster() -> None:
  """Joins a run whose processes a cluster has started, as it tells each.

  SLURM, Kubernetes (with `jax[k8s]`) and Cloud TPU are known to jax. Under
  SLURM the GPUs of a node are those of `slurm_devices`.

  Raises:
    ConfigError: GPUs that can't be shared out, no cluster, or no answer.

  Example:
    >>> node = {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "3"}
    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, {**node, "SLURM_GPUS_ON_NODE": "8"}):
    ...   join_cluster()
    Traceback (most recent call last):
      ...
    isthmus.train.config.ConfigError: 3 tasks on a node that shows each 8 ...
  """
  try:
    _initialize(local_device_ids=slurm_devices(os.environ))
  except ConfigError as error:
    if "should be defined" not in str(error):
      raise
    raise ConfigError(
      f"--distributed finds no cluster: {error} Tell each process, with "
      "--coordinator, --processes and --process"
    ) from error


def _initialize(**given: Any) -> None:
  import jax

  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, **given)
  except (ValueError, RuntimeError) as error:
    raise ConfigError(" ".join(str(error).split())) from error


def slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
  """Which of the GPUs that a SLURM task sees it takes: its share, none unused.

  jax alone gives a task one GPU, whose number is that of the task on its node,
  so that one task on a node of eight would leave seven idle. Here the tasks of
  a node share its GPUs evenly. What SLURM has already divided, by
  `--gpus-per-task` or `--gpu-bind`, is not divided again.

  Args:
    environment: variables; `SLURM_STEP_TASKS_PER_NODE`, `SLURM_NODEID`,
      `SLURM_LOCALID`, `SLURM_GPUS_ON_NODE` and `CUDA_VISIBLE_DEVICES` are
      read.

  Returns:
    Places in the list of visible GPUs; None to leave it to jax: this isn't
    SLURM, nothing tells how many GPUs there are, or `JAX_LOCAL_DEVICE_IDS`
    does.

  Raises:
    ConfigError: GPUs that the node's tasks can't share evenly.

  Example:
    >>> node = {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}
    >>> slurm_devices({**node, "SLURM_GPUS_ON_NODE": "8"})
    [4, 5, 6, 7]
    >>> bound = {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}
    >>> slurm_devices({**node, **bound})  # by --gpus-per-task
    [0, 1, 2, 3]
  """
  if "SLURM_LOCALID" not in environment or environment.get(
    "JAX_LOCAL_DEVICE_IDS"
  ):
    return None
  shown = environment.get("CUDA_VISIBLE_DEVICES", "").strip(",")
  count = environment.get("SLURM_GPUS_ON_NODE", "")
  visible = len(shown.split(",")) if shown else int(count or 0)
  if not visible:
    return None
  total = int(count or visible)
  tasks = _tasks(environment)
  if tasks == 1 or visible * tasks == total:
    return list(range(visible))
  if visible % tasks:
    raise ConfigError(
      f"{tasks} tasks on a node that shows each {visible} GPUs: ask SLURM for "
      "--ntasks-per-node that divides them, or for --gpus-per-task"
    )
  share = visible // tasks
  first = int(environment["SLURM_LOCALID"]) * share
  return list(range(first, first + share))


def _tasks(environment: Mapping[str, str]) -> int:
  """How many tasks of the step run on this node; 1 if nothing tells."""
  listed = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
  counts: list[int] = []
  for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):
    counts += [int(count)] * int(times or 1)
  node = int(environment.get("SLURM_NODEID", 0))
  return counts[node] if node < len(counts) else counts[0]
