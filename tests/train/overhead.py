"""`python -m tests.train.overhead DIR`: the loop's rate over the bare step's.

A process of its own, on one device: the test run checks types on every call
and splits two cores over eight devices, neither of which a user does.
"""

import pathlib
import sys
import time

import jax
import numpy as np

from isthmus.train import config, loop


def main(folder: pathlib.Path) -> None:
  job = config.load(
    "quickstart:cpu",
    [
      "steps=100",
      "batch_size=2",
      "save_every=0",
      "eval_every=0",
      "report=None",
    ],
  )
  run, begun = loop.Run(job), []
  step = run.__dict__.pop("step")

  class Timed(loop.Run):
    """The very same compiled step; notes when each was handed over."""

    def __init__(self, job):
      self.__dict__.update(run.__dict__)

    def step(self, state, batch):
      begun.append(time.perf_counter())
      return step(state, batch)

  loop.Run = Timed
  for attempt in range(3):
    with jax.set_mesh(run.mesh):
      state, before, bare = run.init(), None, []
      batches = [b for _, b in run.train.iterate(0, 8)]
      for i in range(job.steps):
        state, metrics = step(state, batches[i % 8])
        jax.block_until_ready(before)  # as in the loop, one is under way
        before = metrics
        bare.append(time.perf_counter())
    begun.clear()
    job.run(folder / str(attempt))
    seconds = [float(np.median(np.diff(times[20:]))) for times in (bare, begun)]
    print(seconds[0] / seconds[1], flush=True)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
