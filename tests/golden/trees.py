"""The names of all parameters, kept in files: names are API.

Checkpoints, sharding rules, exports and weight decay find parameters by path,
so a renamed module breaks what others have saved. A file here holds a line for
each parameter of one subject, `path shape dtype`. Subjects are the blocks of
`tests/nets/test_blocks.py` and the smoke variants of all recipes.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from isthmus.train import config
from isthmus.train.jobs import Fit
from isthmus.train.mesh import path_name
from tests.nets.suite import Entry
from tests.nets.test_blocks import BLOCKS

FOLDER = pathlib.Path(__file__).parent
REMEDY = (
  "parameter paths are API: keep them, or run `python -m tests.golden --write` "
  "and tell of it in the changelog"
)


def subjects() -> dict[str, Callable[[], list[str]]]:
  """Name -> a function that makes the lines; its file is NAME.txt here."""
  blocks = {f"blocks/{e.name}": (lambda e=e: block(e)) for e in BLOCKS}
  names = config.recipe_names()
  recipes = {f"recipes/{n}": (lambda n=n: recipe(n)) for n in names}
  return blocks | recipes


def block(entry: Entry) -> list[str]:
  """Lines of an entry of the suite of blocks, in float32."""
  model = entry.build(dtype=np.dtype("float32"))
  x = jax.eval_shape(entry.inputs, jax.random.key(0))
  return list(lines(jax.eval_shape(model.init, jax.random.key(0), x)))


def recipe(name: str) -> list[str]:
  """Lines of the models of a recipe's smoke variant, each once."""
  found = fits(config.load(f"{name}:smoke"))
  return sorted({line for fit in found for line in lines(variables(fit))})


def fits(job: Any) -> list[Fit]:
  """What a job trains: itself, the runs of a study, or nothing."""
  if isinstance(job, Fit):
    return [job]
  return list(job.runs().values()) if hasattr(job, "runs") else []


def variables(fit: Fit) -> Any:
  """Shapes of all a model's collections, as `Fit` makes them."""
  example = fit.data.open("train")[0]
  if fit.transform is not None:
    example = fit.transform(example, np.random.default_rng(0))
  batch = {k: np.asarray(v)[None] for k, v in example.items()}
  batch = {k: v for k, v in batch.items() if v.dtype.kind in "biuf"}
  return jax.eval_shape(
    lambda batch, key: fit.task.init(fit.model, batch, key),
    batch,
    jax.random.key(0),
  )


def lines(tree: Any) -> Iterator[str]:
  """`path shape dtype` of each leaf, sorted."""
  named = {path_name(p): x for p, x in jax.tree.leaves_with_path(tree)}
  for name in sorted(named):
    yield f"{name} {list(named[name].shape)} {named[name].dtype}"


def path(name: str) -> pathlib.Path:
  return FOLDER / f"{name}.txt"


def kept(name: str) -> list[str] | None:
  """The lines of a subject's file, or None if there is none."""
  file = path(name)
  return file.read_text().splitlines() if file.is_file() else None


def difference(old: list[str] | None, new: list[str]) -> str | None:
  """What changed, in one line; None if nothing did."""
  if old is None:
    return f"has no file; {REMEDY}"
  if old == new:
    return None
  gone = [x for x in old if x not in set(new)]
  added = [x for x in new if x not in set(old)]
  parts = [f"gone {_some(gone)}"] if gone else []
  parts += [f"new {_some(added)}"] if added else []
  return f"{'; '.join(parts) or 'the order changed'}; {REMEDY}"


def _some(lines: list[str], most: int = 4) -> str:
  more = f" and {len(lines) - most} more" if len(lines) > most else ""
  return ", ".join(lines[:most]) + more


def orphans() -> list[str]:
  """Files of subjects that are no more."""
  names = (p.relative_to(FOLDER) for p in FOLDER.rglob("*.txt"))
  return sorted({str(p.with_suffix("")) for p in names} - subjects().keys())


def write() -> Iterator[str]:
  """Puts every file in step; yields the names of those that changed."""
  for name, make in subjects().items():
    new = make()
    if new != kept(name):
      path(name).parent.mkdir(exist_ok=True)
      path(name).write_text("".join(f"{line}\n" for line in new))
      yield name
  for name in orphans():
    path(name).unlink()
    yield name
