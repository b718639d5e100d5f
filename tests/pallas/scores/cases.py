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
  "the lse alone": ((150, 300, 4, 2, 64), Options(32, "none", scale=0.3)),
  "the lse alone, not causal": (
    (70, 200, 2, 1, 40),
    Options(128, "none", causal=False, scale=0.5),
  ),
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
  if options.reduce == "none":
    assert found[0] is None
    found, want = found[1:], (lse,)
  else:
    want = want.swapaxes(2, 3), lse
  for one, all_ in zip(found, want, strict=True):
    assert one.shape == all_.shape and one.dtype == jnp.float32
    np.testing.assert_allclose(one, all_, atol=2e-5, rtol=1e-5)
  return True


def check_pooled(
  reduce_logits, shape, dtype, *, heads=2, rows=128, reduce, repeats=0
):
  """True: the means of all blocks come too, and nothing else changes.

  Args:
    reduce_logits: an implementation.
    shape: of the tokens, [b t n d]; the last of them are the queries.
    dtype: of all.
    heads: of keys.
    rows: queries.
    reduce: of `Options`.
    repeats: how often the same bits are to come again.
  """
  b, t, n, d = shape
  tokens, *_ = inputs(b, t, 1, n, n, d, dtype=dtype)
  k, *_ = inputs(b, t, 1, heads, heads, d, dtype=dtype, seed=1)
  options = Options(128, reduce, causal=False, scale=d**-0.5)
  run = jax.jit(
    lambda x, k: reduce_logits(x[:, -rows:], k, options=options, tokens=x)
  )
  *found, means = run(tokens, k)
  alone = jax.jit(lambda q, k: reduce_logits(q, k, options=options))
  for x, y in zip(found, alone(tokens[:, -rows:], k), strict=True):
    assert (x is None and y is None) or (x == y).all()
  whole = np.pad(
    np.asarray(tokens, np.float64), ((0, 0), (0, -t % 128), *[(0, 0)] * 2)
  )
  want = whole.reshape(b, -1, 128, n, d).mean(axis=2)
  assert means.shape == want.shape and means.dtype == dtype
  # A sum in float32, and a rounding to the dtype.
  np.testing.assert_allclose(
    np.asarray(means, np.float64),
    want,
    atol=1e-6,
    rtol=float(jnp.finfo(dtype).eps),
  )
  for _ in range(repeats):
    for x, y in zip(run(tokens, k), (*found, means), strict=True):
      assert (x is None and y is None) or (x == y).all()
  return True
