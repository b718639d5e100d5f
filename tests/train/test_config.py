"""Recipes by name and path; dotted overrides; one-line refusals."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import pytest

from isthmus.train import config


class Net(nn.Module):
  width: int = 8
  rate: float = 0.1
  dtype: Any = jnp.float32
  kind: Literal["a", "b"] = "a"
  inner: nn.Module | None = None

  def __post_init__(self):
    if self.width < 1:
      raise ValueError(f"width is {self.width}; it is at least 1")
    super().__post_init__()


def scale(x: float = 1.0, *, name: str = "n", sizes: tuple[int, ...] = (1,)):
  return x, name, sizes


@dataclasses.dataclass(frozen=True)
class Job:
  model: nn.Module = Net(inner=Net(width=2))
  scale: Any = functools.partial(scale, name="q")
  table: dict = dataclasses.field(default_factory=lambda: {"a": 1})
  clip: float | None = 1.0
  pair: tuple[int, int] = (1, 2)
  flag: bool = False
  text: str = "t"
  call: Any = None

  def run(self, workdir):
    return {}


@pytest.mark.parametrize(
  "item, get, value",
  [
    ("model.width=32", lambda j: j.model.width, 32),
    ("model.inner.rate=1", lambda j: j.model.inner.rate, 1.0),
    ("model.dtype=bfloat16", lambda j: j.model.dtype, jnp.dtype("bfloat16")),
    ("model.kind=b", lambda j: j.model.kind, "b"),
    ("model.inner=None", lambda j: j.model.inner, None),
    ("scale.x=3", lambda j: j.scale()[0], 3.0),
    ("scale.sizes=(3, 4)", lambda j: j.scale()[2], (3, 4)),
    ("table.a=7", lambda j: j.table["a"], 7),
    ("clip=None", lambda j: j.clip, None),
    ("clip=2", lambda j: j.clip, 2.0),
    ("pair=[3,4]", lambda j: j.pair, (3, 4)),
    ("flag=True", lambda j: j.flag, True),
    ("text=3", lambda j: j.text, "3"),
    ("text=a=b", lambda j: j.text, "a=b"),
  ],
)
def test_set(item, get, value):
  before = Job()
  after = config.override(before, [item])
  assert get(after) == value
  assert type(get(after)) is type(value)
  assert get(before) != value


@pytest.mark.parametrize(
  "item, words",
  [
    ("model.widht=3", ["Net", "widht", "'width'"]),
    ("modle.width=3", ["modle", "'model'"]),
    ("model.width=3.5", ["int"]),
    ("model.width=True", ["int"]),
    ("model.width=abc", ["int"]),
    ("model.rate=True", ["float"]),
    ("model.rate=nan", ["float"]),
    ("model.kind=c", ["model.kind", "a, b"]),
    ("model.dtype=float33", ["dtype"]),
    ("model.width=0", ["width is 0", "at least 1"]),
    ("model=3", ["model.width", "not set whole"]),
    ("model.name=x", ["no field 'name'"]),
    ("scale.y=1", ["scale", "no argument 'y'"]),
    ("scale=1", ["scale.x"]),
    ("table.b=1", ["no key 'b'"]),
    ("table.a=x", ["int"]),
    ("clip.x=1", ["no fields"]),
    ("pair=(1,2,3)", ["tuple"]),
    ("flag=1", ["bool"]),
    ("steps", ["name=value"]),
    ("=3", ["name=value"]),
    ("a..b=3", ["'a'"]),
  ],
)
def test_refused_in_one_line(item, words):
  with pytest.raises(config.ConfigError) as error:
    config.override(Job(), [item])
  text = str(error.value)
  assert "\n" not in text
  for word in words:
    assert word in text, text


class Heads(nn.Module):
  width: int = 12
  heads: int = 3

  def __post_init__(self):
    if self.width % self.heads:
      raise ValueError(f"width {self.width}, heads {self.heads}")
    super().__post_init__()


def test_fields_that_depend_on_each_other_change_at_once():
  job = dataclasses.replace(Job(), model=Heads())
  items = ["model.width=16", "model.heads=4"]
  for order in (items, items[::-1]):
    model = config.override(job, order).model
    assert (model.width, model.heads) == (16, 4)
  with pytest.raises(config.ConfigError, match=r"model\.width=16.*heads 3"):
    config.override(job, items[:1])


def test_the_later_of_two_values_holds():
  assert config.override(Job(), ["clip=3", "clip=4"]).clip == 4.0
  with pytest.raises(config.ConfigError, match="also set whole"):
    config.override(Job(), ["model.inner=None", "model.inner.width=3"])
  with pytest.raises(config.ConfigError, match="fields of it"):
    config.override(Job(), ["model.inner.width=3", "model.inner=None"])


def test_functions_are_not_set_from_text():
  job = dataclasses.replace(Job(), call=scale)
  with pytest.raises(config.ConfigError, match="chosen in a recipe"):
    config.parse("x", int, "call", scale)
  assert config.flatten(job)["call"].endswith("test_config:scale")


def test_flatten_is_stable_and_complete():
  flat = config.flatten(Job())
  assert flat["model.inner.width"] == "2"
  assert flat["model.dtype"] == "float32"
  assert flat["scale.name"] == "'q'"
  assert flat == config.flatten(Job())
  assert not [v for v in flat.values() if " at 0x" in v], flat
  changed = config.flatten(config.override(Job(), ["model.inner.width=3"]))
  assert {k for k in flat if flat[k] != changed[k]} == {"model.inner.width"}


def test_names():
  with pytest.raises(config.ConfigError, match="'quickstart'"):
    config.load("quikstart")
  with pytest.raises(config.ConfigError, match="'smoke'"):
    config.load("quickstart:smok")


def test_path(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "import dataclasses\n"
    "@dataclasses.dataclass(frozen=True)\n"
    "class Job:\n"
    "  size: int = 1\n"
    "  def run(self, workdir): return {}\n"
    "def get_config(variant='x'):\n"
    "  return Job(size=len(variant))\n"
  )
  assert config.load(str(path)).size == 1
  assert config.load(f"{path}:abc").size == 3
  assert config.load(f"{path}:abc", ["size=9"]).size == 9


@pytest.mark.parametrize(
  "source, words",
  [
    ("x = 1", "no function get_config"),
    ("def get_config(): return 3", "no run"),
    ("raise RuntimeError('broken')", "RuntimeError: broken"),
    ("def get_config(", "SyntaxError"),
    ("def get_config(): raise ValueError('no good')", "no good"),
  ],
)
def test_bad_recipe_files(tmp_path, source, words):
  path = tmp_path / "bad.py"
  path.write_text(source)
  with pytest.raises(config.ConfigError, match=words):
    config.load(str(path))


def test_missing_file():
  with pytest.raises(config.ConfigError, match="no such file"):
    config.load("nowhere/mine.py")
