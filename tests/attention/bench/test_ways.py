"""Ways to choose: what is counted is what is read, by level; mass by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import BlockMask, attention
from isthmus.attention.bench.ways import WAYS, kept_mass, kept_share, way
from isthmus.attention.permute import reorder

pytestmark = pytest.mark.once

BLOCK, T = 16, 256
PLACES = jnp.array([0, 3, 100, 200, 255])


def some(*slow):
  """All ways, some of them in the slow suite alone."""
  marks = dict.fromkeys(slow, pytest.mark.slow)
  return [pytest.param(x, marks=marks.get(x, ())) for x in WAYS]


def drawn(heads=2):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((1, T, 4, 8), (1, T, heads, 8), (1, T, heads, 8))
  return tuple(
    2 * jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)
  )


@pytest.fixture(scope="module")
def read():
  """(mask, order, result) of a way at a level, each found once."""
  found = {}

  def run(name, level):
    if (name, level) not in found:
      chosen = way(name, level, block=BLOCK, length=T)

      @jax.jit
      def both(q, k, v):
        order = None if chosen.order is None else chosen.order(q, k)
        return chosen.select(q, k), order, chosen.attend(q, k, v, causal=True)

      found[name, level] = both(*drawn())
    return found[name, level]

  return run


def seen(mask, order):
  """Bool [n, t, s], of keys as they stand."""
  dense = np.broadcast_to(mask.to_dense(), (1, 4, T, T))[0]
  if order is None:
    return dense
  order = np.repeat(np.asarray(order[0]), 4 // order.shape[1], axis=0)
  found = np.zeros_like(dense)
  rows = np.arange(T)[:, None]
  for head, places in enumerate(order):
    found[head][rows, places] = dense[head]
  return found & np.tril(np.ones((T, T), bool))


@pytest.mark.parametrize("name", some("mass", "pbs-kv", "proxy-kv"))
def test_what_is_counted_is_what_is_read(name, read):
  q, k, v = drawn()
  mask, order, o = read(name, 0.5)
  assert mask.lists.block == (BLOCK, BLOCK)
  k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
  x = jnp.einsum("btnd,bsnd->bnts", q, k) * 8**-0.5
  dense = jax.nn.softmax(
    jnp.where(jnp.tril(jnp.ones((T, T), bool)), x, -jnp.inf), axis=-1
  )
  kept = np.where(seen(mask, order), np.asarray(dense[0]), 0)
  share = kept.sum(axis=-1)
  want = np.einsum("nts,snd->tnd", kept / share[..., None], v[0])
  np.testing.assert_allclose(o[0], want, rtol=1e-4, atol=1e-5)
  found = kept_mass(drawn()[0], drawn()[1], mask, order, queries=PLACES)
  np.testing.assert_allclose(found[0], share[:, PLACES], rtol=1e-5)
  assert share.min() < 0.98
  full, partial = mask.to_blocks()
  blocks = np.broadcast_to(full | partial, (1, 4, 16, 16)).sum()
  np.testing.assert_allclose(kept_share(mask), blocks / 4 / 136, rtol=1e-6)


@pytest.mark.parametrize("name", some(*set(WAYS) - {"pbs", "unpermuted"}))
def test_more_is_kept_at_higher_levels_and_all_at_1(name, read):
  shares = [float(kept_share(read(name, x)[0])) for x in (0.5, 1.0)]
  assert shares[0] < shares[1]
  # A segment of two blocks, permuted, is read whole.
  whole = 136 + 8 * name.startswith("pbs")
  assert shares[1] * 136 == pytest.approx(whole)
  dense = attention(*drawn(), causal=True)
  np.testing.assert_allclose(read(name, 1.0)[2], dense, rtol=1e-5, atol=1e-5)


def test_heads_have_choices_of_their_own(read):
  one, each = (
    np.asarray(read(name, 0.5)[0].to_dense())[0]
    for name in ("proxy", "proxy-head")
  )
  # Budgets are each head's in any case; where they go is the proxy's.
  counts = [x.sum((1, 2)) / BLOCK**2 for x in (one, each)]
  np.testing.assert_allclose(*counts, atol=8)
  assert (one != each).mean() > 0.02
  shapes = [
    jax.eval_shape(way(n, 0.5, block=BLOCK, length=T).order, *drawn()[:2])
    for n in ("pbs", "pbs-kv")
  ]
  assert [x.shape for x in shapes] == [(1, 4, T), (1, 2, T)]


def test_mass_of_a_short_last_block_and_of_keys_in_another_order():
  q, k, _ = (x[:, :250] for x in drawn())
  places = jnp.array([249, 240, 7])
  mask = BlockMask.causal(250, block=(BLOCK, BLOCK))
  whole = kept_mass(q, k, mask, queries=places)
  np.testing.assert_allclose(whole, np.ones((1, 4, 3)), rtol=1e-6)
  order = jnp.arange(250, dtype=jnp.int32)[::-1][None, None].repeat(2, 1)
  last = BlockMask.from_blocks(
    jnp.zeros((1, 1, 16, 16), bool).at[..., -1].set(True),
    block=(BLOCK, BLOCK), q_length=250, kv_length=250,
  )  # fmt: skip
  found = kept_mass(q, k, last, order, queries=places)
  back = reorder(k, order)[:, 240:]  # keys 9, 8, ..., 0
  x = jnp.einsum("bund,bsnd->bnus", q[:, places], jnp.repeat(k, 2, 2))
  y = jnp.einsum("bund,bsnd->bnus", q[:, places], jnp.repeat(back, 2, 2))
  seen = jnp.arange(250) <= places[:, None]
  below = jax.nn.logsumexp(jnp.where(seen, x * 8**-0.5, -jnp.inf), axis=-1)
  seen = jnp.arange(10)[::-1] <= places[:, None]
  above = jax.nn.logsumexp(jnp.where(seen, y * 8**-0.5, -jnp.inf), axis=-1)
  np.testing.assert_allclose(found, jnp.exp(above - below), rtol=1e-4)


@pytest.mark.parametrize(
  "name, level, words",
  [("masses", 0.5, "'masses' is none of window"), ("mass", 1.5, "lies in")],
)
def test_refused(name, level, words):
  with pytest.raises(ValueError, match=words):
    way(name, level, block=BLOCK, length=T)
