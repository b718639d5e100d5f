"""Rows of chunks and lanes, and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.moba.rows import Chunks, chunks

X = jnp.arange(2 * 5 * 4 * 3).reshape(2, 5, 4, 3)


@pytest.mark.parametrize("c", [1, 2, 5])
def test_there_and_back(c):
  parts = Chunks(b=2, t=5, n=4, heads=2, c=c)
  rows = parts.rows(X)
  assert rows.shape == (-(-5 // c), 4, 2 * c, 3)
  np.testing.assert_array_equal(parts.back(rows), X)
  stats = parts.stats(jnp.swapaxes(X[..., 0], 1, 2))
  np.testing.assert_array_equal(stats, rows[..., 0])


def test_a_row_is_a_query_and_a_head_of_the_group():
  parts = Chunks(b=2, t=5, n=4, heads=2, c=5)
  rows = parts.rows(X)[0]
  for b, t, n in np.ndindex(2, 5, 4):
    lane, row = b * 2 + n // 2, t * 2 + n % 2
    np.testing.assert_array_equal(rows[lane, row], X[b, t, n])
  np.testing.assert_array_equal(parts.lanes(X[:, :, :2])[3], X[1, :, 1])
  lane = jnp.array([3, 0], jnp.int32)
  row = jnp.array([[9, 10, 0], [3, 10, 2]], jnp.int32)
  flat = parts.flat(lane, row)
  assert (flat[:, 1] == 40).all()
  for i, j in ((0, 0), (0, 2), (1, 0), (1, 2)):
    np.testing.assert_array_equal(
      X.reshape(40, 3)[flat[i, j]], rows[lane[i], row[i, j]]
    )
  each = parts.each(jnp.array([[1, 2], [3, 4]]))
  assert each.tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
  assert parts.each(jnp.array([[1]])).tolist() == [[1]] * 4


def test_chunks_hold_at_least_a_query():
  assert chunks(X, X[:, :, :2], 7) == Chunks(2, 5, 4, 2, 3)
  assert chunks(X, X[:, :, :1], 1).c == 1
  assert chunks(X, X, 10**6).c == 5
