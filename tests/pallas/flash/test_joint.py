"""What a backward pass knows of rows, against autodiff of one softmax."""

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.pallas.flash.joint import delta, sinks_back, weightless
from tests.attention.oracle import by_hand, inputs


def case():
  """(q, k, v, sinks), cotangents, a mask with a row that sees nothing."""
  *args, do, dlse = inputs(1, 5, 7, 4, 2, 8)
  mask = np.ones((5, 7), bool)
  mask[2], mask[3, :4] = False, False
  return (*args, jnp.linspace(-1, 1, 4)), do, dlse, mask


def test_the_sinks_gradient():
  args, do, dlse, mask = case()
  (o, lse), grads = by_hand(args, do, dlse, mask)
  o, lse = jnp.asarray(o, jnp.float32), jnp.asarray(lse, jnp.float32)
  rows = delta(o, lse, do, dlse)
  got = sinks_back(args[3], lse, rows)
  np.testing.assert_allclose(got, grads[3], atol=1e-5)
  low = sinks_back(args[3].astype(jnp.bfloat16), lse, rows)
  assert low.dtype == jnp.bfloat16
  assert sinks_back(None, lse, rows) is None


def test_a_sink_of_no_weight_has_no_gradient():
  lse, rows = jnp.full((1, 1, 3), -jnp.inf), jnp.ones((1, 1, 3))
  assert sinks_back(jnp.full(1, -jnp.inf), lse, rows).tolist() == [0]


def test_delta_is_the_softmax_s_own():
  """`sum_j p_j dx_j` is 0 with it: what all logits share has no gradient."""
  args, do, dlse, mask = case()
  (o, lse), _ = by_hand(args[:3], do, None, mask)
  rows = delta(*(jnp.asarray(x, jnp.float32) for x in (o, lse)), do, 0 * dlse)
  q, k, v = (np.asarray(x, np.float64) for x in args[:3])
  k, v = k.repeat(2, axis=2), v.repeat(2, axis=2)
  x = np.einsum("btnd,bsnd->bnts", q, k) * 8**-0.5
  p = np.where(mask, np.exp(x - np.where(np.isinf(lse), 0, lse)[..., None]), 0)
  dp = np.einsum("btnd,bsnd->bnts", np.asarray(do, np.float64), v)
  left = np.sum(p * (dp - np.asarray(rows)[..., None]), axis=-1)
  assert np.abs(np.sum(p * dp, axis=-1)).max() > 0.1
  np.testing.assert_allclose(left, 0, atol=1e-5)


def test_rows_without_keys():
  """Whatever their cotangents hold."""
  o, lse = jnp.zeros((1, 2, 1, 4)), jnp.array([[[-jnp.inf, 0.5]]])
  nan = jnp.full_like(o, jnp.nan)
  dlse = jnp.array([[[jnp.nan, 2.0]]])
  assert delta(o, lse, nan, dlse).tolist() == [[[0, -2]]]
  assert jnp.exp(7.0 - weightless(lse)).tolist()[0][0][0] == 0


def test_sums_are_wide():
  o = jnp.ones((1, 1, 1, 512), jnp.bfloat16)
  do = o.at[..., 0].set(1 / 256)
  got = jax.jit(delta)(o, jnp.zeros((1, 1, 1)), do, jnp.zeros((1, 1, 1)))
  assert got.item() == 511 + 1 / 256
