"""The best of each row in plain XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.keep import ref
from isthmus.pallas.keep.api import Options
from tests.pallas.keep.cases import CASES, check

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", CASES)
def test_as_by_sorting(name):
  assert check(ref.keep, name)


def test_weights_of_many_sizes_add_up_to_the_target():
  x = np.exp(np.random.default_rng(0).uniform(-20, 8, (4, 40))).astype("f4")
  target = jnp.array([x[0].max(), 0.0, 1e9, x[3].sum() * 0.5])
  found = np.asarray(
    ref.kept(jnp.asarray(x), target, jnp.full(4, 40), options=Options("value"))
  )
  assert found.sum(1)[:3].tolist() == [1, 0, 40]
  assert (x[3] * found[3]).sum() >= target[3]
  assert x[3][found[3]].min() > x[3][~found[3]].max()


def test_one_copy_of_scores_serves_many_targets():
  """No array of all targets' scores is made for the search."""
  shape = jax.ShapeDtypeStruct
  args = (shape((2, 1, 5, 17), "f4"), shape((2, 3, 5), "i4"), shape((5,), "i4"))
  f = jax.jit(lambda *a: ref.kept(*a, options=Options("one")))
  text = f.lower(*args).compile().as_text()
  loop = [x for x in text.splitlines() if " while(" in x]
  assert loop and not any("2,3,5,17" in x for x in loop), loop


def test_nothing_is_sorted():
  x, limit = jax.ShapeDtypeStruct((8, 128), "f4"), jnp.full(8, 128)
  f = jax.jit(
    lambda x: ref.kept(x, jnp.float32(0.9), limit, options=Options("softmax"))
  )
  text = f.lower(x).as_text()
  assert "sort" not in text and "top_k" not in text
