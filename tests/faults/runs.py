"""The toy's run: in this process, in another one, and how it should end."""

import contextlib
import io
import json
import pathlib
from typing import Any

import jax
import numpy as np

from isthmus.train import cli
from isthmus.train.ckpt import restore_params
from tests.train.child import TOY, Child, records

STEPS = 16


def run(*arguments: object) -> int:
  """The command line in this process, on one device: its exit status."""
  return cli.main(["--config", str(TOY), *map(str, arguments)])


def told(*arguments: object, config: object = TOY) -> tuple[int, str, str]:
  """(exit status, stdout, stderr) of the command line in this process."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      status = cli.main(["--config", str(config), *map(str, arguments)])
    except SystemExit as end:
      status = end.code
  return status, out.getvalue(), err.getvalue()


def start(workdir: pathlib.Path, folder: pathlib.Path, *more: object) -> Child:
  """The toy in a process of its own."""
  return Child("--config", TOY, "--workdir", workdir, *more, folder=folder)


def params(workdir: pathlib.Path) -> tuple[int, Any]:
  """(step, parameters) of the last good checkpoint."""
  step, tree = restore_params(workdir / "ckpt")
  return step, jax.tree.map(np.asarray, tree)


def same_run(
  workdir: pathlib.Path, reference: pathlib.Path, *, steps: int = STEPS
) -> None:
  """Bit-equal parameters, and each record once, equal in what is learnt."""
  same_params(workdir, reference, steps=steps)

  def learnt(folder):
    return [
      (r["step"], {k: v for k, v in r.items() if "per_second" not in k})
      for r in records(folder)
    ]

  assert learnt(workdir) == learnt(reference)
  assert [s for s, r in learnt(workdir) if "train/loss" in r] == list(
    range(1, steps + 1)
  )


def same_params(
  workdir: pathlib.Path, reference: pathlib.Path, *, steps: int = STEPS
) -> None:
  """Bit-equal parameters of the last step."""
  (step, mine), (last, expected) = params(workdir), params(reference)
  assert step == last == steps
  jax.tree.map(np.testing.assert_array_equal, mine, expected)


def one_line(text: str) -> str:
  """The one line that says what went wrong; there is no traceback."""
  lines = [x for x in text.splitlines() if x.startswith("isthmus:")]
  assert len(lines) == 1, text
  assert "Traceback" not in text, text
  return lines[0]


def reached(log: pathlib.Path, step: int, before: int | None = None) -> bool:
  """Whether a run has come to a step, one newer than the file `before`."""
  try:
    if log.stat().st_ino == before:
      return False  # a run that starts rewrites its records
    last = log.read_text().rpartition("\n")[0].rpartition("\n")[2]
  except FileNotFoundError:
    return False
  return bool(last) and json.loads(last)["step"] >= step
