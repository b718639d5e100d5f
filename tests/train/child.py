"""The command line in a child process: quick to start, safe to kill.

Children are forked from a server that has imported everything and touched no
device, so that a test which needs ten of them pays for one import of jax.
"""

import atexit
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import time

TOY = pathlib.Path(__file__).with_name("toy.py")
_PRELOAD = (
  "isthmus.train.cli",
  "isthmus.train.loop",
  "isthmus.train.optim.chain",
  "isthmus.train.tasks.classify",
  "matplotlib.backends.backend_agg",
  "matplotlib.figure",
  "optax",
  "orbax.checkpoint",
  "tensorboardX",
)


def _main(argv: list[str], settings: dict[str, object], err: str, out: str):
  for number, path in ((1, out), (2, err)):
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, number)
  sys.stdout = open(1, "w", buffering=1, closefd=False)
  sys.stderr = open(2, "w", buffering=1, closefd=False)
  import jax

  for name, value in settings.items():
    jax.config.update(name, value)
  from isthmus.train import cli

  status = cli.main(argv)
  atexit._run_exitfuncs()  # a process of multiprocessing skips them
  sys.exit(status)


class Child:
  """One run of `isthmus ARGV` on `devices` CPU devices.

  Args:
    argv: the arguments.
    folder: where what it writes to stdout and stderr is kept.
    devices: CPU devices that it sees.
  """

  def __init__(self, *argv: object, folder: pathlib.Path, devices: int = 1):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    self.argv = [str(a) for a in argv]
    number = len(list(folder.glob("*.stderr")))
    self._err = folder / f"{number}.stderr"
    self._out = folder / f"{number}.stdout"
    self._err.touch()
    settings = {"jax_platforms": "cpu", "jax_num_cpu_devices": devices}
    self.process = context.Process(
      target=_main,
      args=(self.argv, settings, str(self._err), str(self._out)),
      daemon=True,
    )
    self.process.start()

  @property
  def err(self) -> str:
    return self._err.read_text()

  @property
  def out(self) -> str:
    return self._out.read_text()

  def send(self, number: int) -> None:
    assert self.process.pid
    os.kill(self.process.pid, number)

  def kill(self) -> None:
    """kill -9; fails if there was nothing left to kill."""
    self.send(signal.SIGKILL)
    assert self.wait() == -signal.SIGKILL, self.err

  def wait(self, seconds: float = 120) -> int:
    """The exit status."""
    self.process.join(seconds)
    if self.process.exitcode is None:
      self.process.kill()
      raise TimeoutError(f"{self.argv} after {seconds} s: {self.err}")
    return self.process.exitcode

  def until(self, condition, seconds: float = 120) -> None:
    """Waits for a condition while the process is alive."""
    ends = time.monotonic() + seconds
    while not condition():
      assert self.process.exitcode is None, (self.process.exitcode, self.err)
      assert time.monotonic() < ends, (self.argv, self.err)
      time.sleep(0.001)


def records(workdir: pathlib.Path) -> list[dict]:
  """The lines of metrics.jsonl, every one of them whole."""
  path = workdir / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]
