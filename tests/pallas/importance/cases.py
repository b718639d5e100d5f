"""Importance against the whole softmax, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.pallas.importance.api import Options
from tests.attention.oracle import inputs
from tests.pallas.scores.cases import logits

# (queries, keys, heads of queries and of keys, width), settings.
CASES = {
  "few queries": ((20, 300, 4, 2, 64), Options(scale=0.3)),
  "more than a tile": ((150, 200, 2, 1, 64), Options(scale=0.3)),
  "more queries than keys": ((150, 40, 1, 1, 8), Options(scale=0.3)),
  "not causal": ((130, 200, 3, 1, 16), Options(causal=False, scale=0.3)),
  "many keys": ((40, 1200, 2, 2, 40), Options(causal=False, scale=-0.3)),
}


def check(importance, name, dtype):
  """True: it equals its sums. lse is the softmax's; some are -inf."""
  (t, s, n, heads, d), options = CASES[name]
  q, *_ = inputs(2, t, 1, n, n, d, dtype=dtype)
  k, *_ = inputs(2, s, 1, heads, heads, d, dtype=dtype, seed=1)
  x = logits(q, k, options)
  with np.errstate(divide="ignore"):
    lse = np.log(np.exp(x).sum(axis=3))
  safe = np.where(np.isneginf(lse), 0, lse)
  want = np.exp(x - safe[..., None]).sum(axis=2)
  found = jax.jit(lambda *x: importance(*x, options=options))(
    q, k, jnp.asarray(lse, jnp.float32)
  )
  assert found.shape == want.shape and found.dtype == jnp.float32
  np.testing.assert_allclose(found, want, atol=5e-6, rtol=3e-5)
  return True


def check_blind(importance, dtype):
  """True: a query that is said to see nothing gives nothing."""
  q, k, *_ = inputs(1, 3, 40, 1, 1, 8, dtype=dtype)
  lse = jnp.array([[[2.0, -jnp.inf, 3.0]]])
  run = jax.jit(lambda *x: importance(*x, options=Options(causal=False)))
  rest = jnp.array([0, 2])
  np.testing.assert_allclose(
    run(q, k, lse), run(q[:, rest], k, lse[..., rest]), rtol=1e-5
  )
  return True
