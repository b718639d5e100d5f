"""The mask of all conditions against one decided element by element."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.mask import EMPTY, check_window, positions, visible
from tests.attention.oracle import dense_mask

SEGMENTS = jnp.asarray([[0, 0, 1, 1, 1], [3, 3, 3, 4, 4]], jnp.int32)
KEYS = jnp.asarray([[[0, 2, EMPTY, 1, 4, 3, 7]]], jnp.int32)
CASES = [
  {"causal": True},
  {"window": (1, 2)},
  {"window": (None, 0)},
  {"causal": True, "window": (2, None)},
  {"causal": True, "kv_positions": KEYS},
  {"kv_positions": KEYS},
  {"segment_ids": SEGMENTS, "kv_segment_ids": jnp.zeros((2, 7), jnp.int32)},
  {"causal": True, "q_positions": jnp.arange(40).reshape(2, 4, 5) % 7},
]


@pytest.mark.parametrize("settings", CASES)
def test_visible_equals_the_rule(settings):
  if "q_positions" in settings:
    settings = {
      **settings,
      "q_positions": settings["q_positions"].astype(jnp.int32),
    }
  mask = visible(lengths=(5, 7), num_kv_heads=2, **settings)
  expected = dense_mask(2, 5, 7, 4, 2, **settings)
  ours = np.broadcast_to(mask, (2, 2, 2, 5, 7)).reshape(2, 4, 5, 7)
  np.testing.assert_array_equal(ours, expected)
  assert expected.any() and not expected.all()


def test_no_condition_is_no_mask():
  assert visible(lengths=(5, 7), num_kv_heads=1) is None


def test_positions_are_aligned_at_the_end():
  p, j = positions(3, 5, None, None)
  assert p.ravel().tolist() == [2, 3, 4] and j.ravel().tolist() == [*range(5)]


def test_windows():
  assert check_window(None) is None
  assert check_window(3) == (3, 3)
  assert check_window((2, None)) == (2, None)
  assert check_window((None, None)) is None
  with pytest.raises(ValueError, match="right width -2"):
    check_window((1, -2))
