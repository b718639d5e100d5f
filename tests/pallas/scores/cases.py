"""Reduced scores against all of them, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.pallas.scores.api import Options
from tests.attention.oracle import inputs

# (rows, columns, heads of rows and of columns, width), settings.
CASES = {
  "queries by keys": ((150, 150, 4, 2, 64), Options(32, scale=0.3)),
  "sums, fewer queries": ((70, 150, 2, 2, 64), Options(16, "sum", scale=0.3)),
  "more queries than keys": ((150, 40, 1, 1, 8), Options(8, scale=0.3)),
  "not causal": ((70, 200, 2, 1, 40), Options(64, "sum", causal=False)),
  "keys by queries": (
    (300, 20, 2, 4, 64),
    Options(128, "sum", "columns", scale=0.3),
  ),
  "keys by queries, not causal": (
    (130, 200, 1, 3, 16),
    Options(64, "max", "columns", False, 0.3),
  ),
}


def check(reduce_scores, name, dtype):
  """True: it equals them. lse is the softmax's; some are -inf."""
  (r, c, h, g, d), options = CASES[name]
  x, *_ = inputs(2, r, 1, h, h, d, dtype=dtype)
  y, *_ = inputs(2, c, 1, g, g, d, dtype=dtype, seed=1)
  n = max(h, g)
  rows, columns = (
    np.repeat(np.asarray(z, np.float64), n // z.shape[2], axis=2)
    for z in (x, y)
  )
  logits = np.einsum("brnd,bcnd->bnrc", rows, columns) * options.scale
  i, j = np.arange(r)[:, None], np.arange(c)
  by_row = options.queries == "rows"
  seen = np.ones((r, c), bool)
  if options.causal:
    seen = j <= i + c - r if by_row else i <= j + r - c
  logits = np.where(seen, logits, -np.inf)
  with np.errstate(divide="ignore"):
    lse = np.log(np.exp(logits).sum(3 if by_row else 2))
  safe = np.where(np.isneginf(lse), 0, lse)
  p = np.exp(logits - (safe[..., None] if by_row else safe[:, :, None]))
  p = np.pad(p, ((0, 0), (0, 0), (0, 0), (0, -c % options.side)))
  p = p.reshape(2, n, r, -1, options.side)
  want = (p.max(4) if options.reduce == "max" else p.sum(4)).swapaxes(2, 3)
  found = jax.jit(lambda *x: reduce_scores(*x, options=options))(
    x, y, jnp.asarray(lse, jnp.float32)
  )
  assert found.shape == want.shape and found.dtype == jnp.float32
  np.testing.assert_allclose(found, want, atol=2e-6, rtol=2e-5)
  return True
