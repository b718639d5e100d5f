"""Plain selectors: the suite, and what each one keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import Attention, attention
from isthmus.attention import select as module
from isthmus.attention.permute import pbs_attention
from isthmus.attention.proxy import proxy_attention
from isthmus.attention.select import select_attention
from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.dispatch import prefer
from isthmus.pallas.importance import ref as importance_ref
from isthmus.pallas.keep import ref as keep_ref
from isthmus.pallas.scores import ref as scores_ref
from tests.attention.oracle import inputs
from tests.attention.selectors import BLOCK, blocks_of, check, no_square
from tests.jitted import jitted

pytestmark = pytest.mark.once

antidiagonal_select = jitted(module.antidiagonal_select)
pooled_select = jitted(module.pooled_select)
window_select = jitted(module.window_select)
Q, K, *_ = inputs(1, 96, 96, 4, 2, 8)


def of(select, **settings):
  return functools.partial(select, block=BLOCK, **settings)


def test_the_suite():
  half = {"threshold": 0.5}
  assert check(of(pooled_select, **half), whole={"threshold": 1})
  assert check(of(antidiagonal_select, **half), whole={"threshold": 1})
  assert check(of(window_select, window=20, sink=16), whole={"window": 300})


@pytest.mark.parametrize("select", [pooled_select, antidiagonal_select])
def test_no_square_is_made(select):
  assert no_square(select)


def causal_softmax(x):
  x = np.where(np.tril(np.ones(x.shape[-2:], bool)), x, -np.inf)
  p = np.exp(x - x.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def test_pooled_keeps_the_best_of_the_means():
  mask = pooled_select(Q, K, block=BLOCK, threshold=None, top_k=3, sink=False)
  kept = blocks_of(mask)
  means = (np.asarray(x).reshape(6, BLOCK, -1, 8).mean(1) for x in (Q, K))
  q, k = means
  for n in range(4):
    score = q[:, n] @ k[:, n // 2].T
    for m in range(6):
      best = sorted(range(m), key=lambda g: -score[m, g])[:2]
      assert set(np.flatnonzero(kept[0, n, m])) == {m, *best}
  assert kept.sum(-1).max() == 3


def test_pooled_keeps_the_mass():
  kept = blocks_of(pooled_select(Q, K, block=BLOCK, threshold=0.6, sink=False))
  q, k = (np.asarray(x).reshape(6, BLOCK, -1, 8).mean(1) for x in (Q, K))
  for n in range(4):
    score = q[:, n] @ k[:, n // 2].T * 8**-0.5
    for m in range(1, 6):
      p = np.exp(score[m, :m]) / np.exp(score[m, :m]).sum()
      found = kept[0, n, m, :m]
      assert p[found].sum() >= 0.6
      assert p[found].sum() - p[found].min() < 0.6


@pytest.mark.parametrize("near", [0.0, 1.5])
def test_antidiagonals_are_summed(near):
  """Also where most of a block's mass is its own."""
  stride, side = 4, BLOCK // 4
  own = near * jax.random.normal(jax.random.key(0), (6, 1, 8))
  own = jnp.repeat(own, BLOCK, axis=0)
  q, k = Q + own, K + own
  mask = antidiagonal_select(
    q, k, block=BLOCK, stride=stride, threshold=0.7, sink=False
  )
  kept = blocks_of(mask)
  for n in range(4):
    x = np.asarray(q)[0, :, n] @ np.asarray(k)[0, :, n // 2].T
    x = x.reshape(24, stride, 24, stride)
    squares = sum(x[:, i, :, stride - 1 - i] for i in range(stride))
    p = causal_softmax(squares / stride * 8**-0.5)
    mass = p.reshape(6, side, 6, side).sum((1, 3))
    for m in range(6):
      share = mass[m] / mass[m].sum()
      order = np.argsort(-share)
      # The fewest that have it, the own block among those in the race.
      fewest = order[: 1 + (np.cumsum(share[order]) < 0.7).sum()]
      want = np.isin(np.arange(6), fewest) | (np.arange(6) == m)
      np.testing.assert_array_equal(kept[0, n, m], want)


def test_a_window_and_a_sink():
  kept = blocks_of(window_select(Q, K, window=17, sink=20, block=BLOCK))
  m, g = np.arange(6)[:, None], np.arange(6)
  np.testing.assert_array_equal(kept[0, 0], (g <= m) & ((g >= m - 2) | (g < 2)))
  kept = blocks_of(window_select(Q, K, window=0, sink=0, block=BLOCK))
  np.testing.assert_array_equal(kept[0, 0], g == m)


def test_what_does_not_fit_is_refused():
  short = K[:, :80]
  for select in (pooled_select, antidiagonal_select):
    with pytest.raises(ValueError, match="96 queries and 80 keys"):
      select(Q, short)
  with pytest.raises(ValueError, match="one of them"):
    pooled_select(Q, K, top_k=3)
  with pytest.raises(ValueError, match="one of them"):
    pooled_select(Q, K, threshold=None)
  with pytest.raises(ValueError, match="doesn't divide"):
    antidiagonal_select(Q, K, stride=3)
  with pytest.raises(ValueError, match="not in"):
    antidiagonal_select(Q, K, threshold=0.0)
  with pytest.raises(ValueError, match="96 queries and 80 keys"):
    window_select(Q, short, window=5)


def test_the_first_block_is_kept_if_asked_for():
  q = jnp.ones_like(Q).at[:, 48:].set(-1)
  kept = blocks_of(pooled_select(q, K, block=BLOCK, threshold=0.2))
  assert kept[..., 0].all()


@pytest.mark.parametrize(
  "settings, said",
  [
    ({"causal": False}, "causal is False"),
    ({"window": 3}, "takes no window; it is 3"),
    ({"q_positions": jnp.zeros((1, 1, 8), jnp.int32)}, "not of a cache's"),
  ],
)
def test_what_a_layer_may_ask_for_is_refused(settings, said):
  with pytest.raises(ValueError, match=said):
    select_attention(
      Q, K, K, select=lambda q, k: pooled_select(q, k, block=BLOCK), **settings
    )


def test_a_layer_attends_over_what_is_selected():
  """With everything kept as a dense layer, and else not."""
  x = jax.random.normal(jax.random.key(0), (2, 50, 12))
  sizes = dict(num_heads=4, num_kv_heads=2, head_dim=8)
  dense = Attention(**sizes)
  params = dense.init(jax.random.key(1), x)
  want, _ = dense.apply(params, x)
  for threshold in (1, 0.3):
    attend = functools.partial(
      select_attention, select=of(pooled_select, threshold=threshold)
    )
    found, _ = Attention(**sizes, attend=attend).apply(params, x)
    assert (np.abs(found - want).max() < 1e-5) == (threshold == 1)
  mask = pooled_select(Q, K, block=BLOCK, threshold=0.3)
  o, lse = select_attention(
    Q, K, K, select=of(pooled_select, threshold=0.3), return_lse=True
  )
  np.testing.assert_allclose(o, attention(Q, K, K, mask=mask), atol=1e-6)
  assert lse.shape == (1, 4, 96)


@pytest.mark.skipif(not has_mosaic(), reason="the kernels need jax 0.11")
@pytest.mark.parametrize(
  "attend, dtype",
  [
    (
      functools.partial(select_attention, select=of(module.pooled_select)),
      jnp.float32,
    ),
    (functools.partial(pbs_attention, block=16, segment=32), jnp.float32),
    (functools.partial(proxy_attention, block=32, min_tokens=32), jnp.bfloat16),
  ],
)
def test_gradients_pass_kernels_that_choose(attend, dtype, monkeypatch):
  """Those have no derivative; attention's, over what was chosen, is taken."""
  q, k, v, do, _ = inputs(1, 96, 96, 2, 1, 16)
  q, k, v = (x.astype(dtype) for x in (q, k, v))

  def gradients():
    def loss(q, k, v):
      return (attend(q, k, v, impl="xla").astype(jnp.float32) * do).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

  want = gradients()
  # A kernel that is differentiated refuses, and plain XLA takes its place.
  monkeypatch.setattr(keep_ref, "keep", None)
  if dtype == jnp.bfloat16:
    monkeypatch.setattr(scores_ref, "reduce_logits", None)
    monkeypatch.setattr(importance_ref, "importance", None)
  with interpreted(), prefer("mosaic", "xla"):
    found = gradients()
  for x, y in zip(found, want, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-2 if x.dtype != "f4" else 1e-6)
    assert np.abs(np.asarray(y, np.float32)).max() > 0.1
