"""Drawn queries and keys: their logits are the formula's."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.bench.drawn import RARE, SINK, STRENGTHS, structured

pytestmark = pytest.mark.once

T, N, K, D = 4096, 4, 2, 64


@pytest.fixture(scope="module")
def arrays():
  return structured(0, T, heads=N, kv_heads=K, width=D, dtype=jnp.float32)


def logits(q, k, head, rows):
  x = q[0, rows, head] @ k[0, :, head // (N // K)].T * D**-0.5
  x = np.asarray(x, np.float64)
  return np.where(np.arange(T) <= np.asarray(rows)[:, None], x, -np.inf)


def test_near_keys_the_sink_and_topics_are_attended_to(arrays):
  q, k, v = arrays
  assert q.shape == (1, T, N, D) and k.shape == v.shape == (1, T, K, D)
  rows = np.arange(1024, T, 61)
  for head in range(N):
    x = logits(q, k, head, rows)
    own = x[np.arange(len(rows)), rows]
    low, high = (STRENGTHS["near"][i] + STRENGTHS["topic"][i] for i in (0, 1))
    assert low - 1 < own.mean() < high + 1
    far = x[:, SINK:512]
    # Keys far away lie at about the same level, but for topics and few others.
    assert np.median(own) - np.median(far) > 12
    lead = np.median(x[:, :SINK]) - np.median(far)
    assert STRENGTHS["sink"][0] - 2 < lead < STRENGTHS["sink"][1] + 2
    # Nearer keys are read more, in the way of a power.
    place = np.arange(len(rows))
    steps = [np.median(x[place, rows - distance]) for distance in (1, 16, 256)]
    assert steps[0] > steps[1] + 1 > steps[2] + 2


def test_few_keys_are_heavy_for_all_queries_of_a_kv_head(arrays):
  q, k, _ = arrays
  rows = np.arange(T - 200, T)
  for head in range(N):
    x = logits(q, k, head, rows)[:, SINK : T // 2]
    column = np.median(x, axis=0) - np.median(x)
    heavy = np.flatnonzero(column > STRENGTHS["heavy"][0] / 2 + 2)
    entry = np.asarray(k[0, :, head // (N // K), D // 2 + D // 8 + 1])
    true = np.flatnonzero(entry[: T // 2] > 0)
    assert set(true[true >= SINK] - SINK) <= set(heavy)
    assert len(true) <= 8 * T / RARE


def test_a_seed_is_an_array_and_another_one_another():
  sizes = {"heads": 2, "kv_heads": 1, "width": 16}
  q, k, _ = structured(3, 64, **sizes)
  again, other = structured(3, 64, **sizes), structured(4, 64, **sizes)
  np.testing.assert_array_equal(q, again[0])
  assert (np.asarray(k) != np.asarray(other[1])).mean() > 0.1
  assert q.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "heads, kv_heads, width, words",
  [(4, 2, 20, "width is 20"), (4, 2, 8, "width is 8"), (4, 3, 16, "4 heads")],
)
def test_refused(heads, kv_heads, width, words):
  with pytest.raises(ValueError, match=words):
    structured(0, 64, heads=heads, kv_heads=kv_heads, width=width)
