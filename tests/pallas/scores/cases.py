"""Reduced logits against all of them, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.pallas.scores.api import Options
from tests.attention.oracle import inputs

# (queries, keys, heads of queries and of keys, width), settings.
CASES = {
  "as many": ((150, 150, 4, 2, 64), Options(32, scale=0.3)),
  "sums, fewer queries": ((70, 150, 2, 2, 64), Options(16, "sum", scale=0.3)),
  "more queries than keys": ((150, 40, 2, 1, 8), Options(8, scale=0.3)),
  "sums, some see nothing": (
    (300, 140, 4, 2, 64),
    Options(128, "sum", scale=0.3),
  ),
  "not causal": ((130, 200, 3, 1, 16), Options(64, causal=False, scale=0.3)),
  "sums, not causal": (
    (70, 200, 2, 1, 40),
    Options(64, "sum", causal=False, scale=0.5),
  ),
}


def logits(q, k, options):
  """All of them in float64, -inf where a key is not seen."""
  t, s, wide = q.shape[1], k.shape[1], np.asarray(k, np.float64)
  wide = np.repeat(wide, q.shape[2] // k.shape[2], axis=2)
  x = np.einsum("btnd,bsnd->bnts", np.asarray(q, np.float64), wide)
  x = x * options.scale
  if options.causal:
    seen = np.arange(s) <= np.arange(t)[:, None] + s - t
    x = np.where(seen, x, -np.inf)
  return x


def check(reduce_logits, name, dtype):
  """True: it equals them."""
  (t, s, n, heads, d), options = CASES[name]
  q, *_ = inputs(2, t, 1, n, n, d, dtype=dtype)
  k, *_ = inputs(2, s, 1, heads, heads, d, dtype=dtype, seed=1)
  x = logits(q, k, options)
  ends = ((0, 0), (0, 0), (0, 0), (0, -s % options.side))
  x = np.pad(x, ends, constant_values=-np.inf)
  groups = x.reshape(2, n, t, -1, options.side)
  with np.errstate(divide="ignore"):
    lse = np.log(np.exp(x).sum(axis=3))
    want = np.log(np.exp(groups).sum(axis=4))
  if options.reduce == "max":
    want = groups.max(axis=4)
  found = jax.jit(lambda q, k: reduce_logits(q, k, options=options))(q, k)
  for one, all_ in zip(found, (want.swapaxes(2, 3), lse), strict=True):
    assert one.shape == all_.shape and one.dtype == jnp.float32
    np.testing.assert_allclose(one, all_, atol=2e-5, rtol=1e-5)
  return True
