"""Two processes of two devices each that train as one, over gloo."""

import pathlib
import socket

import jax
import numpy as np

from isthmus.train.ckpt import restore_params
from tests.train.child import TOY, Child, records


def port() -> int:
  """One that is free."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(
  workdir: pathlib.Path, folder: pathlib.Path, *more: object
) -> list[Child]:
  """The toy, its parameters split over the four devices."""
  argv = ["--config", f"{TOY}:all", "--workdir", workdir, *more]
  argv += ["--coordinator", f"localhost:{port()}", "--processes", 2]
  return [
    Child(*argv, "--process", i, folder=folder, devices=2) for i in (0, 1)
  ]


def end(pair: list[Child]) -> list[Child]:
  """Waits for both; both must have ended well."""
  for child in pair:
    assert child.wait() == 0, (child.err, [c.err for c in pair])
  return pair


def last(workdir: pathlib.Path) -> int:
  """The last step that a run has recorded, or 0."""
  try:
    found = records(workdir)
  except (OSError, ValueError):  # nothing yet, or half a line
    return 0
  return found[-1]["step"] if found else 0


def beyond(workdir: pathlib.Path, step: int) -> bool:
  return last(workdir) > step


def same(workdir: pathlib.Path, expected: pathlib.Path, steps: int) -> None:
  """The losses of another run, each once, and its parameters."""

  def losses(folder):
    return [
      (r["step"], name, r[name])
      for r in records(folder)
      for name in ("train/loss", "eval/loss")
      if name in r
    ]

  mine, others = losses(workdir), losses(expected)
  assert [x[:2] for x in mine] == [x[:2] for x in others]
  np.testing.assert_allclose(
    [x[2] for x in mine], [x[2] for x in others], rtol=1e-5
  )
  (step, params), (final, wanted) = (
    restore_params(folder / "ckpt") for folder in (workdir, expected)
  )
  assert step == final == steps
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    params,
    wanted,
  )
