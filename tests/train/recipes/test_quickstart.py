"""The quickstart's report, with and without an evaluation of the model."""

import dataclasses
import math

import jax
import pytest

from isthmus.data.text import Text
from isthmus.train.config import load
from isthmus.train.loop import Run
from isthmus.train.recipes import quickstart


@dataclasses.dataclass(frozen=True)
class Lines:
  """Ten documents, two of them held out."""

  def documents(self, split):
    for i in range(10):
      if (i % 5 == 0) == (split == "eval"):
        yield f"{i}.py", f"def add{i}(x):\n  return x + {i}\n" * 8


@pytest.mark.parametrize("eval_every", [None, 0])
def test_the_report_shows_the_model_where_it_was_evaluated(
  tmp_path, capsys, eval_every
):
  job = dataclasses.replace(
    load("quickstart:smoke"),
    data=Text(corpus=Lines(), seq_len=64),
    steps=2,
    eval_every=eval_every,
    save_every=0,
    report=quickstart.compare,
  )
  results = job.run(tmp_path)
  names = {"gzip -9", "5-gram", "xz -9"}
  names |= {"this model"} if eval_every is None else set()
  shown = {
    name.removeprefix("bits_per_byte/"): value
    for name, value in results.items()
    if name.startswith("bits_per_byte/")
  }
  assert set(shown) == names
  assert min(shown.values()) > 0
  if eval_every is None:
    assert shown["this model"] == results["eval/bits_per_byte"]
  assert ("this model" in capsys.readouterr().out) == (eval_every is None)
  assert (tmp_path / "bits_per_byte.png").stat().st_size > 5000


def test_1b_has_a_billion_parameters_that_every_axis_divides():
  run = Run(load("quickstart:1b", ["mesh.fsdp=4", "mesh.model=2"]))
  kernels = run.target.params["stack"]["blocks"]
  assert sum(x.size for x in jax.tree.leaves(run.target.params)) == 1028214784
  for kernel in jax.tree.leaves((kernels["attn"], kernels["mlp"])):
    part = kernel.sharding.shard_shape(kernel.shape)
    assert part[0] == 20 and 8 * math.prod(part) == kernel.size
  assert run.eval is None
