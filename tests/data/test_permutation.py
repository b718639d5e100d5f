"""Permutations: one to one, fair, and a function of the seed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.permutation import permute


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_permutation_is_bijective(n, seed):
  assert sorted(permute(np.arange(n), n, seed).tolist()) == list(range(n))


def test_permutation_of_a_range_too_large_to_store():
  n = 2**40 + 12345
  i = np.arange(n - 5000, n)
  out = permute(i, n, 3)
  assert out.min() >= 0 and out.max() < n
  assert len(np.unique(out)) == len(i)
  # Spread over the range, and free of the order that went in.
  assert abs(out.mean() / n - 0.5) < 0.03
  assert abs(np.corrcoef(i, out)[0, 1]) < 0.06


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_orders_of_a_small_range_are_about_equally_likely(n):
  seeds = np.arange(60000)
  rows = np.stack([permute(0 * seeds + i, n, (seeds,)) for i in range(n)], 1)
  _, counts = np.unique(rows @ 10 ** np.arange(n), return_counts=True)
  orders = math.factorial(n)
  assert len(counts) == orders
  # chi2 has mean df and deviation sqrt(2 df).
  chi2, df = ((counts / (60000 / orders) - 1) ** 2).sum(), orders - 1
  assert chi2 * 60000 / orders < df + 5 * math.sqrt(2 * df)


def test_words_broadcast_as_if_permuted_one_by_one():
  i, epochs = np.array([3, 3, 0, 6]), np.array([0, 1, 2, 2])
  together = permute(i, 7, (5, epochs))
  apart = [int(permute(a, 7, (5, e))) for a, e in zip(i, epochs, strict=True)]
  assert together.tolist() == apart


def test_seeds_and_the_order_of_words_matter():
  i = np.arange(100)
  results = [permute(i, 100, s) for s in (0, 1, (0, 1), (1, 0), (0, 0))]
  assert len({tuple(r.tolist()) for r in results}) == 5


def test_values_are_pinned_so_that_a_resumed_run_sees_the_same_order():
  assert permute(np.arange(8), 8, (0, 0)).tolist() == [
    6, 3, 5, 7, 1, 0, 4, 2,
  ]  # fmt: skip
  assert permute(np.arange(4), 1000, (7, 2)).tolist() == [291, 960, 827, 472]


@pytest.mark.parametrize("i,n", [(5, 5), (-1, 5), (0, 0)])
def test_positions_outside_the_range_are_refused(i, n):
  with pytest.raises(ValueError, match=str(n)):
    permute(i, n, 0)
