"""Shapes at public boundaries: annotated everywhere, checked in the tests."""

import ast
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from isthmus.attention.sdpa import attention
from isthmus.data.source import ArraySource
from isthmus.nets.norm import rms_norm
from isthmus.pallas.precision import dot
from isthmus.train.tasks.lm import cross_entropy

ROOT = pathlib.Path(__file__).parents[1]
PORTIONS = ("attention", "data", "nets", "pallas", "train")
BARE = ("Array", "jax.Array", "jnp.ndarray", "np.ndarray")


def bare(source: str) -> list[str]:
  """`function(parameter)` of public functions whose arrays have no shape."""

  def arrays(annotation):
    """Names of array types, but for those within a jaxtyping subscript."""
    if annotation is None:
      return
    if isinstance(annotation, ast.Constant) and isinstance(
      annotation.value, str
    ):
      annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.Subscript):
      if ast.unparse(annotation.value) == "Callable":
        return
      inner = annotation.slice
      parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
      if any(isinstance(p, ast.Constant) for p in parts[1:]):
        return  # Float[Array, "b t"]
      for part in parts:
        yield from arrays(part)
    elif isinstance(annotation, ast.BinOp):
      yield from arrays(annotation.left)
      yield from arrays(annotation.right)
    elif isinstance(annotation, ast.List):
      for part in annotation.elts:
        yield from arrays(part)
    elif ast.unparse(annotation) in BARE:
      yield ast.unparse(annotation)

  def visit(body, prefix=""):
    for node in body:
      if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
        yield from visit(node.body, f"{node.name}.")
      elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        special = node.name.startswith("__") and node.name != "__call__"
        if special or node.name.startswith("_") and node.name != "__call__":
          continue
        spec = node.args
        given = (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)
        for arg in (*given, spec.vararg, spec.kwarg):
          if arg is not None and any(arrays(arg.annotation)):
            yield f"{prefix}{node.name}({arg.arg})"

  return list(visit(ast.parse(source).body))


@pytest.mark.parametrize("portion", PORTIONS)
def test_arrays_of_public_functions_have_shapes(portion):
  found = {
    str(path.relative_to(ROOT)): bare(path.read_text())
    for path in sorted((ROOT / portion).rglob("*.py"))
  }
  found = {path: names for path, names in found.items() if names}
  assert not found, f"say Float[Array, 'b t m'], or Any for a tree: {found}"


def test_bare_arrays_are_found():
  """And only those: trees are `Any`, private functions are free."""
  assert bare(
    """
def one(x: jax.Array, y: Float[Array, "b t"], *, z: Array | None = None): ...
def two(x: "np.ndarray", y: Any, **rest: dict[str, jax.Array]): ...
def _three(x: Array): ...
class Four:
  def __call__(self, *xs: Sequence[Array]): ...
  def _five(self, x: Array): ...
class _Six:
  def seven(self, x: Array): ...
def eight(x: Int[np.ndarray, "#b t"] | None, f: Callable[[Array], Array]): ...
"""
  ) == ["one(x)", "one(z)", "two(x)", "two(rest)", "Four.__call__(xs)"]


X = np.ones((2, 3, 4, 8), np.float32)


@pytest.mark.parametrize(
  "call",
  [
    lambda: dot("ij,jk->ik", jnp.ones((2, 3), int), jnp.ones((3, 2))),
    lambda: attention(jnp.asarray(X[0]), jnp.asarray(X), jnp.asarray(X)),
    lambda: attention(*[jnp.asarray(X)] * 3, segment_ids=jnp.ones((2, 3))),
    lambda: rms_norm(jnp.ones((3, 4)), jnp.ones(5), 1e-6),
    lambda: rms_norm(jnp.ones((3, 4), int), jnp.ones(4), 1e-6),
    lambda: ArraySource({"x": X}).take(np.zeros((1, 2), int)),
    lambda: ArraySource({"x": X}).take(np.zeros(2)),
    lambda: cross_entropy(jnp.ones((2, 3, 4)), jnp.zeros((2, 4), int)),
    lambda: cross_entropy(jnp.ones((2, 3, 4)), jnp.zeros((2, 3))),
  ],
  ids=[
    "pallas, dtype",
    "attention, shape",
    "attention, dtype",
    "nets, shape",
    "nets, dtype",
    "data, shape",
    "data, dtype",
    "train, shape",
    "train, dtype",
  ],
)
def test_a_wrong_array_is_refused_in_the_tests(call):
  """tests/conftest.py checks the annotations of all five portions."""
  with pytest.raises(TypeCheckError):
    call()


def test_right_arrays_pass():
  q = jnp.asarray(X)
  assert attention(q, q, q, causal=True).shape == X.shape
  assert ArraySource({"x": X}).take(np.arange(1))["x"].shape == (1, 3, 4, 8)
  assert dot("ij,jk->ik", jnp.ones((2, 3)), jnp.ones((3, 2))).shape == (2, 2)
  assert rms_norm(jnp.ones((3, 4)), jnp.ones(4), 1e-6).shape == (3, 4)
  loss = cross_entropy(jnp.ones((2, 3, 4)), jnp.zeros((2, 3), int))
  assert loss.shape == (2, 3)
