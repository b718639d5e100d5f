"""ProxyAttn: its scores, budgets, and what is kept of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import proxy, sdpa
from isthmus.attention.proxy import proxy_attention
from tests.attention.oracle import inputs
from tests.attention.selectors import BLOCK, blocks_of, check, no_square
from tests.jitted import jitted

pytestmark = pytest.mark.once

attention = jitted(sdpa.attention)
block_budget = jitted(proxy.block_budget)
proxy_scores = jitted(proxy.proxy_scores)
proxy_select = jitted(proxy.proxy_select)

Q, K, V, *_ = inputs(2, 101, 101, 4, 2, 8)
SMALL = {"block": BLOCK, "min_tokens": BLOCK}


def test_the_suite():
  select = functools.partial(proxy.proxy_select, **SMALL, gamma=0.3)
  assert check(select, whole={"gamma": 1})
  assert check(functools.partial(select, stride=1), whole={"gamma": 1})


def test_no_square_is_made():
  assert no_square(proxy.proxy_select)


def softmax(q, k):
  """Causal, in float64, of [b t n d] by head."""
  x = np.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
  x = np.where(np.tril(np.ones(x.shape[-2:], bool)), x, -np.inf)
  p = np.exp(x - x.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 4])
def test_scores_are_the_tiles_of_the_mean_head(groups, stride):
  """Sampled queries see sampled keys by the places they came from."""
  q, k = (np.asarray(x, np.float64) for x in (Q, K))
  q = q.reshape(2, 101, groups, -1, 8).mean(3)[:, ::stride]
  k = k.reshape(2, 101, groups, -1, 8).mean(3)[:, ::stride]
  p, side = softmax(q, k), BLOCK // stride
  ends = -p.shape[2] % side
  p = np.pad(p, ((0, 0), (0, 0), (0, ends), (0, ends)))
  p = p.reshape(2, groups, 7, side, 7, side).max((3, 5))
  found = proxy_scores(Q, K, groups=groups, stride=stride, block=BLOCK)
  np.testing.assert_allclose(found, p, atol=1e-6)


def test_a_proxy_of_each_kv_head_is_its_own_ranking():
  """groups = heads, stride 1, one query head each: exact scores."""
  q = Q[:, :, ::2]
  found = proxy_scores(q, K, groups=2, stride=1, block=BLOCK)
  p = softmax(*(np.asarray(x, np.float64) for x in (q, K)))
  p = np.pad(p, ((0, 0), (0, 0), (0, 11), (0, 11)))
  p = p.reshape(2, 2, 7, BLOCK, 7, BLOCK).max((3, 5))
  np.testing.assert_allclose(found, p, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.2, 0.7, 0.95])
def test_budgets_are_of_the_last_queries(gamma):
  wide = np.repeat(np.asarray(K, np.float64), 2, axis=2)
  p = softmax(np.asarray(Q, np.float64), wide)[:, :, -BLOCK:].mean(2)
  p = np.pad(p, ((0, 0), (0, 0), (0, 11))).reshape(2, 4, 7, BLOCK).sum(-1)
  ranked = -np.sort(-p / p.sum(-1, keepdims=True), axis=-1)
  want = (np.cumsum(ranked, -1) < gamma).sum(-1) + 1
  found = block_budget(Q, K, gamma=gamma, block=BLOCK)
  np.testing.assert_array_equal(found, want)


def test_each_head_keeps_its_budget_of_the_shared_ranking():
  q = Q * jnp.array([0.1, 1, 4, 8])[:, None]
  mask = proxy_select(q, K, **SMALL, gamma=0.4, groups=2)
  kept = blocks_of(mask)
  score = np.asarray(proxy_scores(q, K, groups=2, block=BLOCK))
  budget = np.asarray(block_budget(q, K, gamma=0.4, block=BLOCK))
  assert len(np.unique(budget)) > 1
  for b, n, m in np.ndindex(2, 4, 7):
    count = max(1, -(-int(budget[b, n]) * (m + 1) // 7))
    order = sorted(range(m + 1), key=lambda g: (-score[b, n // 2, m, g], g))
    want = {*order[:count], m}
    assert set(np.flatnonzero(kept[b, n, m])) == want


def test_there_is_a_least_number_of_blocks():
  few = blocks_of(proxy_select(Q, K, block=BLOCK, min_tokens=1, gamma=0.1))
  more = blocks_of(proxy_select(Q, K, block=BLOCK, min_tokens=50, gamma=0.1))
  for m in range(7):
    assert (more[:, :, m].sum(-1) >= min(m + 1, 4)).all()
  assert few[:, :, 6].sum(-1).min() < 4


def test_more_mass_keeps_what_less_kept():
  f = functools.partial(proxy_select, Q, K, **SMALL)
  kept = [blocks_of(f(gamma=gamma)) for gamma in (0.2, 0.5, 0.8, 1)]
  for less, more in zip(kept, kept[1:], strict=False):
    assert not (less & ~more).any() and (more & ~less).any()


def test_equal_heads_keep_the_same():
  q = jnp.repeat(Q[:, :, :1], 4, axis=2)
  k = jnp.repeat(K[:, :, :1], 2, axis=2)
  kept = blocks_of(proxy_select(q, k, **SMALL, gamma=0.4, groups=2))
  np.testing.assert_array_equal(kept, np.repeat(kept[:, :1], 4, axis=1))


def test_attention_is_over_what_is_kept():
  f = functools.partial(proxy_attention, **SMALL, gamma=0.3, return_lse=True)
  o, lse = jax.jit(f)(Q, K, V)
  mask = proxy_select(Q, K, **SMALL, gamma=0.3)
  want = attention(Q, K, V, mask=mask, return_lse=True)
  np.testing.assert_allclose(o, want[0], atol=2e-6)
  np.testing.assert_allclose(lse, want[1], atol=2e-6)
  assert np.abs(o - attention(Q, K, V, causal=True)).max() > 0.01


def test_what_does_not_fit_is_refused():
  for settings, said in (
    ({"stride": 3}, "the stride, 3, doesn't divide the block, 16"),
    ({"groups": 4}, "2 kv heads don't split into 4 groups"),
    ({"gamma": 0}, "gamma is 0, not in"),
  ):
    with pytest.raises(ValueError, match=said):
      proxy_attention(Q, K, V, block=BLOCK, **settings)
  with pytest.raises(ValueError, match="101 queries and 90 keys"):
    proxy_attention(Q, K[:, :90], V[:, :90])


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
    proxy_attention(Q, K, V, **SMALL, **settings)
