"""What is kept, against a sort, for every implementation."""

import jax.numpy as jnp
import numpy as np

from isthmus.pallas.keep.api import Options

# (x's leading axes, those of targets, length of a row), what is weighed.
CASES = {
  "numbers of equal ones": ((3, 5), (3, 5), 17, "one", 3),
  "numbers": ((2, 3, 8), (2, 3, 8), 300, "one", None),
  "one copy for many": ((2, 1, 8), (2, 3, 8), 130, "one", 7),
  "one copy, rows that don't divide": ((2, 1, 5), (2, 3, 5), 60, "one", None),
  "sums": ((4, 8), (4, 8), 128, "value", None),
  "sums of equal ones": ((8,), (8,), 200, "value", 4),
  "mass": ((2, 12), (), 140, "softmax", None),
  "mass of few": ((4,), (4,), 9, "softmax", None),
}


def by_sorting(weight, x, target, limit):
  """One row at a time, in float64."""
  kept = np.zeros(x.shape, bool)
  for row in np.ndindex(x.shape[:-1]):
    order = sorted(range(limit[row]), key=lambda j: (-x[row][j], j))
    total = 0.0
    for j in order:
      if total >= target[row]:
        break
      kept[(*row, j)] = True
      total += float(weight[row][j])
  return kept


def check(keep, name):
  """True: as a sort has it; the target is between two sums where they round."""
  own, lead, m, weigh, levels = CASES[name]
  rng = np.random.default_rng(sum(map(ord, name)))
  x = rng.normal(0, 3, (*own, m)).astype(np.float32)
  if weigh != "softmax":
    x = np.exp(x)
  if levels is not None:
    x = (rng.integers(0, levels, x.shape) / levels).astype(np.float32)
  shape = np.broadcast_shapes(own, lead)
  limit = rng.integers(0, m + 1, shape[-1:]).astype(np.int32)
  limit[:2] = 0, m
  whole = np.broadcast_to(x, (*shape, m))
  limits = np.broadcast_to(limit, shape)
  seen = np.arange(m) < limits[..., None]
  weight = seen * whole.astype(float)
  if weigh == "one":
    weight = np.ones((*shape, m))
    target = rng.integers(0, m + 2, lead).astype(np.int32)
  elif weigh == "value":
    target = (rng.random(lead) * 1.2 * weight.sum(-1)).astype(np.float32)
    if levels is not None:
      target = np.round(target * levels) / np.float32(levels)
  else:
    weight = seen * np.exp(weight - weight.max(-1, keepdims=True))
    weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-30)
    target = np.float32(0.9) if not lead else rng.random(lead).astype("f4")
  forced = rng.integers(-1, m, shape[-1:]).astype(np.int32)
  ends = np.maximum(limit + rng.integers(-3, 4, limit.shape), 0).astype("i4")
  want = by_sorting(weight, whole, np.broadcast_to(target, shape), limits)
  assert 0 < want.sum() < want.size
  for more in ((forced, ends), (np.int32(-1), limit)):
    args = map(jnp.asarray, (x, target, limit, *more))
    num, index = keep(*args, options=Options(weigh))
    assert num.dtype == index.dtype == np.int32
    assert 0 <= np.min(index) <= np.max(index) < m
    chosen = want | (np.arange(m) == more[0][..., None])
    end = np.minimum(more[1], limit)[..., None]
    chosen = chosen & (np.arange(m) < end)
    np.testing.assert_array_equal(num, chosen.sum(-1))
    np.testing.assert_array_equal(listed(num, index), chosen)
  return True


def listed(num, index):
  """A mask of what is listed, which must ascend."""
  num, index = np.asarray(num), np.asarray(index)
  found = np.zeros(index.shape, bool)
  for row in np.ndindex(num.shape):
    these = index[row][: num[row]]
    assert (np.diff(these) > 0).all()
    found[row][these] = True
  return found
