"""What is kept, against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.keep import keep_best, keep_mass

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def by_sorting(score, weight, target, allowed):
  """One row at a time, in float64."""
  kept = np.zeros(score.shape, bool)
  for row in np.ndindex(score.shape[:-1]):
    order = sorted(
      np.flatnonzero(allowed[row]), key=lambda j: (-score[row][j], j)
    )
    total = 0.0
    for j in order:
      if total >= target[row]:
        break
      kept[(*row, j)] = True
      total += float(weight[row][j])
  return kept


@pytest.mark.parametrize("levels", [3, 1000])
def test_as_many_as_are_asked_for(levels):
  """Few levels make many equal scores."""
  score = (RNG.integers(0, levels, (3, 5, 17)) / levels).astype("float32")
  allowed = RNG.random(score.shape) < 0.7
  count = RNG.integers(0, 18, (3, 5)).astype("int32")
  ones = np.ones(score.shape, np.int32)
  found = jax.jit(keep_best)(*map(jnp.asarray, (score, ones, count, allowed)))
  np.testing.assert_array_equal(found, by_sorting(score, ones, count, allowed))
  want = np.minimum(count, allowed.sum(-1))
  np.testing.assert_array_equal(np.asarray(found).sum(-1), want)


def test_weights_add_up_to_the_target():
  """Weights that are exact, and no scores; over twelve orders of size."""
  score = np.exp(RNG.uniform(-20, 8, (4, 40))).astype("float32")
  score[:, 3] = 0
  weight = RNG.integers(0, 9, score.shape).astype("float32")
  allowed = np.ones(score.shape, bool)
  target = np.array([1, 30.0, 90, 1e9], np.float32)
  found = keep_best(*map(jnp.asarray, (score, weight, target)))
  want = by_sorting(score, weight, target, allowed)
  np.testing.assert_array_equal(found, want)
  assert np.asarray(found[3]).all() and not np.asarray(found[0]).all()


def test_one_copy_of_scores_serves_many_targets():
  score = RNG.random((2, 1, 5, 17)).astype("float32")
  allowed = np.tri(5, 17, 12, dtype=bool)
  count = RNG.integers(0, 18, (2, 3, 5)).astype("int32")
  whole = [np.broadcast_to(x, (2, 3, 5, 17)) for x in (score, allowed)]
  ones = np.ones((2, 3, 5, 17), np.int32)
  score, allowed, target = map(jnp.asarray, (score, allowed, count))
  found = keep_best(score, jnp.ones((1,), jnp.int32), target, allowed)
  want = by_sorting(whole[0], ones, count, whole[1])
  np.testing.assert_array_equal(found, want)
  # No array of all targets' scores is made for the search.
  text = jax.jit(keep_best).lower(score, None, target * 0.1, allowed).compile()
  loop = [x for x in text.as_text().splitlines() if " while(" in x]
  assert loop and not any("2,3,5,17" in x for x in loop), loop


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.999])
def test_mass(threshold):
  score = RNG.normal(0, 3, (6, 50)).astype("float32")
  allowed = RNG.random(score.shape) < 0.6
  allowed[0] = False
  found = np.asarray(
    keep_mass(jnp.asarray(score), threshold, jnp.asarray(allowed))
  )
  p = np.where(allowed, np.exp(score.astype(float)), 0)
  p = p / np.maximum(p.sum(-1, keepdims=True), 1e-30)
  target = np.full(6, threshold)
  np.testing.assert_array_equal(found, by_sorting(p, p, target, allowed))
  assert (np.where(found, p, 0).sum(-1)[1:] >= threshold - 1e-6).all()
  assert not found[0].any()


def test_the_whole_mass_is_everything_and_a_bad_one_is_refused():
  allowed = jnp.array([True, False, True])
  # Of the last one so little that a sum would not notice.
  score = jnp.array([0.0, 0.0, -200.0])
  assert keep_mass(score, 1, allowed).tolist() == [True, False, True]
  assert keep_mass(score, 0.99, allowed).tolist() == [True, False, False]
  for bad in (0, 1.5, -1):
    with pytest.raises(ValueError, match="not in"):
      keep_mass(score, bad, allowed)


def test_nothing_is_sorted():
  x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
  text = jax.jit(lambda x: keep_mass(x, 0.9, x > 0)).lower(x).as_text()
  assert "sort" not in text and "top_k" not in text
