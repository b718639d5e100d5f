"""Scores of needles, of models that are known to find or to miss them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from isthmus.data.needle import LENGTH, Needles
from isthmus.train.metrics.needle import needle_scores

HAY = np.full((3, 101), 97, np.int32)


class Copier(nn.Module):
  """Says what followed the last 14 tokens where they came before.

  Of what lies more than `reach` tokens back it knows nothing.
  """

  reach: int = 1000

  @nn.compact
  def __call__(self, tokens):
    t = tokens.shape[1]
    back = jnp.stack(
      [jnp.pad(tokens, ((0, 0), (i, 0)))[:, :t] for i in range(14)], -1
    )
    same = jnp.all(back[:, :, None] == back[:, None], -1)
    age = jnp.arange(t)[:, None] - jnp.arange(t)
    same = same & (age > 0) & (age <= self.reach)
    found = jnp.argmax(same, axis=-1)
    follow = jnp.take_along_axis(
      jnp.pad(tokens, ((0, 0), (0, 1))), found + 1, axis=1
    )
    said = jnp.where(same.any(-1), follow, 0)
    return jnp.eye(257)[said], {}


def scores(model, pairs=1, **kwargs):
  settings = {"depths": (0.0, 0.5, 1.0), "batch_size": 2, **kwargs}
  return needle_scores(model, {}, HAY, Needles(pairs=pairs).probe, **settings)


def test_a_model_that_copies_finds_all():
  assert scores(Copier()) == {
    "whole/0": 1.0,
    "whole/0.5": 1.0,
    "whole/1": 1.0,
    "whole": 1.0,
    "tokens": 1.0,
  }


def test_a_model_of_short_reach_finds_the_near_ones():
  found = scores(Copier(reach=LENGTH + 10))
  assert found["whole/1"] == 1.0 and found["whole/0"] == 0.0
  assert found["whole/0.5"] == 0.0 and found["whole"] == pytest.approx(1 / 3)
  assert 1 / 3 <= found["tokens"] < 0.6


def test_rows_of_the_last_batch_count_once():
  for size in (1, 2, 3, 8):
    found = scores(Copier(reach=LENGTH + 10), batch_size=size)
    assert found == scores(Copier(reach=LENGTH + 10))


def test_the_seed_draws_the_needles():
  def seen(seed):
    kept = []

    def probe(row, rng, *, depth):
      out = Needles(pairs=2).probe(row, rng, depth=depth)
      kept.append(out[0])
      return out

    needle_scores(Copier(), {}, HAY, probe, depths=(0.5,), seed=seed)
    return np.stack(kept)

  np.testing.assert_array_equal(seen(1), seen(1))
  assert (seen(1) != seen(2)).any()


def test_refusals():
  for rows, depths in ((HAY[:0], (0.5,)), (HAY, ())):
    with pytest.raises(ValueError, match="at least 1 each"):
      needle_scores(Copier(), {}, rows, Needles().probe, depths=depths)
