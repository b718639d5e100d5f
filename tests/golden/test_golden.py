"""Parameter paths, shapes and dtypes are those of the files."""

import flax.linen as nn
import pytest

from isthmus.nets import Mlp
from tests.golden import trees
from tests.nets.suite import Entry


@pytest.mark.parametrize("name", sorted(trees.subjects()))
def test_parameters_are_those_of_the_file(name):
  difference = trees.difference(trees.kept(name), trees.subjects()[name]())
  assert difference is None, f"{name}: {difference}"


def test_no_file_is_left_over():
  assert trees.orphans() == []


class Renamed(nn.Module):
  """Mlp with another name for its first layer."""

  hidden: int

  @nn.compact
  def __call__(self, x, *, train=False):
    h = nn.Dense(self.hidden, use_bias=False, name="wide")(x)
    return nn.Dense(x.shape[-1], use_bias=False, name="down")(nn.gelu(h))


@pytest.mark.parametrize(
  "build, gone, new",
  [
    (
      lambda dtype: Renamed(48),
      "params/up/kernel [32, 48] float32",
      "params/wide/kernel [32, 48] float32",
    ),
    (
      lambda dtype: Mlp(48, param_dtype="bfloat16"),
      "params/up/kernel [32, 48] float32",
      "params/up/kernel [32, 48] bfloat16",
    ),
    (
      lambda dtype: Mlp(40),
      "params/up/kernel [32, 48] float32",
      "params/up/kernel [32, 40] float32",
    ),
  ],
)
def test_a_change_is_said_in_one_line(build, gone, new):
  lines = trees.block(Entry(name="mlp", build=build))
  text = trees.difference(trees.kept("blocks/mlp"), lines)
  assert text and "\n" not in text
  assert gone in text.partition("new")[0] and new in text.partition("new")[2]
  assert "parameter paths are API" in text and "tests.golden --write" in text


def test_a_subject_without_a_file_is_said():
  text = trees.difference(None, ["params/a [1] float32"])
  assert text and text.startswith("has no file; parameter paths are API")


def test_write_puts_files_in_step_and_removes_orphans(tmp_path, monkeypatch):
  monkeypatch.setattr(trees, "FOLDER", tmp_path)
  monkeypatch.setattr(trees, "subjects", lambda: {"nets/a": lambda: ["x", "y"]})
  (tmp_path / "old.txt").write_text("x\n")
  assert trees.orphans() == ["old"]
  assert list(trees.write()) == ["nets/a", "old"]
  assert trees.kept("nets/a") == ["x", "y"] and trees.orphans() == []
  assert list(trees.write()) == []
