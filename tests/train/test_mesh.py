"""Mesh sizes, and shardings by path."""

import jax
import jax.numpy as jnp
import pytest

from isthmus.train import mesh
from isthmus.train.mesh import Mesh, P


def test_shape():
  assert Mesh().shape(8) == (8, 1, 1, 1)
  assert Mesh(data=2, model=4).shape(8) == (2, 1, 4, 1)
  assert Mesh(data=-1, fsdp=4).shape(8) == (2, 4, 1, 1)
  assert Mesh(data=1, seq=-1).shape(6) == (1, 1, 1, 6)


@pytest.mark.parametrize(
  "sizes, words",
  [
    (dict(data=3), "data=3 does not fill 8"),
    (dict(model=3), "model=3 does not fill 8"),
    (dict(data=1), "one device does not fill 8"),
    (dict(data=-1, model=16), "does not fill 8"),
  ],
)
def test_shape_refused(sizes, words):
  with pytest.raises(ValueError, match=words):
    Mesh(**sizes).shape(8)


@pytest.mark.parametrize("sizes", [dict(data=0), dict(fsdp=-2), dict(model=-1)])
def test_sizes_refused(sizes):
  with pytest.raises(ValueError, match="mesh"):
    Mesh(**sizes)


def test_shardings_align_with_the_last_axes():
  devices = Mesh(data=1, fsdp=2, model=4).build()
  tree = {
    "params": {"up": {"kernel": jnp.zeros((3, 4, 8)), "bias": jnp.zeros(8)}},
    "mu": {"up": {"kernel": jnp.zeros((4, 8))}},
    "step": jnp.zeros(()),
  }
  rules = ((r"up/kernel$", P("fsdp", "model")), (r"bias$", P("model")))
  placed = mesh.shardings(tree, rules, devices)
  assert placed["params"]["up"]["kernel"].spec == P(None, "fsdp", "model")
  assert placed["params"]["up"]["bias"].spec == P("model")
  assert placed["mu"]["up"]["kernel"].spec == P("fsdp", "model")
  assert placed["step"].spec == P()


def test_first_rule_wins():
  rules = (("a", P("fsdp")), ("a/b", P("model")))
  devices = Mesh(data=2, fsdp=2, model=2).build()
  with pytest.raises(ValueError, match="'a/b' finds no parameter"):
    mesh.shardings({"a": {"b": jnp.zeros(4)}}, rules, devices)


@pytest.mark.parametrize(
  "rules, words",
  [
    ((("nothing", P()),), "'nothing' finds no parameter"),
    ((("x", P("model", "fsdp", "data")),), "names 3 axes"),
    ((("x", P("rows")),), "no axis 'rows'"),
    ((("x", P("model")),), "6 is not divisible by 4"),
  ],
)
def test_rules_refused(rules, words):
  devices = Mesh(data=2, model=4).build()
  with pytest.raises(ValueError, match=words):
    mesh.shardings({"x": jnp.zeros((4, 6))}, rules, devices)


def test_structs_carry_shardings():
  devices = Mesh(model=8, data=1).build()
  shapes = {"x": jax.ShapeDtypeStruct((8,), jnp.float32)}
  placed = mesh.shardings(shapes, (("x", P("model")),), devices)
  assert mesh.structs(shapes, placed)["x"].sharding.spec == P("model")
