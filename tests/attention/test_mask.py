"""The conditions of a call, as one predicate, against the rule by loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.mask import (
  EMPTY,
  check_window,
  conditions,
  positions,
)
from isthmus.pallas.flash.predicate import Band, Both, Positions, Segments
from tests.attention.oracle import dense_mask

SEGMENTS = jnp.asarray([[0, 0, 1, 1, 1], [3, 3, 3, 4, 4]], jnp.int32)
KV_SEGMENTS = jnp.asarray([[0] * 7, [3, 3, 4, 4, 4, 4, 5]], jnp.int32)
KEYS = jnp.asarray([[[0, 2, EMPTY, 1, 4, 3, 7]]], jnp.int32)
QUERIES = (jnp.arange(40).reshape(2, 4, 5) % 7).astype(jnp.int32)
PACKED = {"segment_ids": SEGMENTS, "kv_segment_ids": KV_SEGMENTS}
CASES = [
  ({"causal": True}, Band(None, 0, 2)),
  ({"window": (1, 2)}, Band(1, 2, 2)),
  ({"window": (None, 0)}, Band(None, 0, 2)),
  ({"causal": True, "window": (2, None)}, Band(2, 0, 2)),
  ({"causal": True, "window": 3}, Band(3, 0, 2)),
  ({"causal": True, "kv_positions": KEYS}, Positions(None, 0)),
  ({"kv_positions": KEYS}, Positions(None, None)),
  ({"causal": True, "q_positions": QUERIES}, Positions(None, 0)),
  ({"window": 2, "q_positions": QUERIES}, Positions(2, 2)),
  (PACKED, Segments()),
  ({"causal": True, **PACKED}, Both(Band(None, 0, 2), Segments())),
  (
    {"window": 1, "kv_positions": KEYS, **PACKED},
    Both(Positions(1, 1), Segments()),
  ),
]


@pytest.mark.parametrize("settings,wanted", CASES, ids=lambda x: str(x)[:40])
def test_conditions_equal_the_rule(settings, wanted):
  predicate, q, k = conditions(5, 7, **settings)
  assert predicate == wanted
  assert (len(q), len(k)) == predicate.operands
  expected = dense_mask(2, 5, 7, 4, 2, **settings)
  assert expected.any() and not expected.all()
  for x in (*q, *k):
    assert x.dtype == jnp.int32 and x.ndim == 3
  # Operands by key are of kv heads; here one is shared.
  ours = predicate(
    np.arange(5)[:, None],
    np.arange(7),
    tuple(x[..., None] for x in q),
    tuple(x[:, :, None] for x in k),
  )
  np.testing.assert_array_equal(np.broadcast_to(ours, (2, 4, 5, 7)), expected)


def test_no_condition_is_no_predicate():
  assert conditions(5, 7) == (None, (), ())
  # Positions that nothing compares say nothing.
  assert conditions(5, 7, q_positions=QUERIES) == (None, (), ())


def test_ids_of_other_types():
  """Small ones are widened; 64 bits could be cut to equal ones."""
  ids = jnp.asarray([[1, 2, -3]], jnp.int8)
  _, (q,), _ = conditions(3, 3, segment_ids=ids, kv_segment_ids=ids)
  assert q.dtype == jnp.int32 and q.tolist() == [[[1, 2, -3]]]
  with (
    jax.enable_x64(True),
    pytest.raises(ValueError, match="segment_ids are int64"),
  ):
    wide = jnp.asarray([[1, 2, 2**33]])
    conditions(3, 3, segment_ids=wide, kv_segment_ids=wide)


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
  with pytest.raises(ValueError, match="left width 2147483648 is not below"):
    check_window(2**31)
