"""The dropout mask: a function of the indices alone, and a fair one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.flash.dropout import keep, words

pytestmark = pytest.mark.once

B, N, T, S = 3, 5, 64, 128


def mask(rate, key=0, b=B, n=N, t=T, s=S):
  index = jnp.ix_(*map(jnp.arange, (b, n, t, s)))
  return np.asarray(keep(words(jax.random.key(key)), *index, rate))


def test_any_tile_has_the_bits_of_the_whole():
  whole = mask(0.3)
  seed = words(jax.random.key(0))
  i, j = jnp.arange(7, 23)[:, None], jnp.arange(50, 99)
  tile = jax.jit(lambda b, n: keep(seed, b, n, i, j, 0.3))(2, 4)
  np.testing.assert_array_equal(tile, whole[2, 4, 7:23, 50:99])


@pytest.mark.parametrize("rate", [0.1, 0.17, 0.5, 0.9])
def test_the_rate_holds_along_every_axis(rate):
  """Within five standard deviations of a binomial, in every row and column."""
  dropped = ~mask(rate)
  for axes in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2), (3,)):
    count = np.prod([dropped.shape[a] for a in axes])
    error = np.abs(dropped.mean(axes) - rate)
    assert error.max() < 5 * np.sqrt(rate * (1 - rate) / count), axes
  assert mask(0.0).all()


def test_neighbours_and_keys_are_uncorrelated():
  x = mask(0.5) * 2.0 - 1
  pairs = [
    *((x[..., :-shift] * x[..., shift:]) for shift in (1, 2, 16)),
    *((x[..., :-shift, :] * x[..., shift:, :]) for shift in (1, 2, 16)),
    *(x[:, :-1] * x[:, 1:], x[:-1] * x[1:]),
    x * (mask(0.5, key=1) * 2.0 - 1),
  ]
  for product in pairs:
    assert abs(product.mean()) < 5 / np.sqrt(product.size)


def test_no_two_rows_agree():
  rows = mask(0.5).reshape(-1, S)
  assert len(np.unique(rows, axis=0)) == len(rows)


def test_keys_of_another_kind_and_all_their_words_count():
  other = words(jax.random.key(0, impl="rbg"))
  assert (other != words(jax.random.key(0))).any()
  data = jnp.asarray([1, 2, 3, 4], jnp.uint32)
  seeds = [
    words(jax.random.wrap_key_data(data.at[k].add(1), impl="rbg"))
    for k in range(4)
  ]
  assert len({tuple(np.asarray(x).tolist()) for x in seeds}) == 4
