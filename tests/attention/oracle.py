"""Attention written out: keys repeated, an explicit t x s mask, autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

EMPTY = 2**31 - 1


def dense_mask(
  b,
  t,
  s,
  n,
  k,
  *,
  causal=False,
  window=None,
  segment_ids=None,
  kv_segment_ids=None,
  q_positions=None,
  kv_positions=None,
):
  """bool [b, n, t, s], decided element by element."""
  if kv_segment_ids is None:
    kv_segment_ids = segment_ids
  # By numpy: a program for each element that is read would take most of a test.
  segment_ids, kv_segment_ids, q_positions, kv_positions = (
    None if x is None else np.asarray(x)
    for x in (segment_ids, kv_segment_ids, q_positions, kv_positions)
  )
  left, right = window if isinstance(window, tuple) else (window, window)
  mask = np.zeros((b, n, t, s), bool)
  for row, head, i, j in np.ndindex(b, n, t, s):
    p, r = i + s - t, j
    if q_positions is not None:
      rows, heads, _ = q_positions.shape
      p = int(q_positions[row % rows, head % heads, i])
    if kv_positions is not None:
      rows, heads, _ = kv_positions.shape
      r = int(kv_positions[row % rows, (head * k // n) % heads, j])
      if r == EMPTY:
        continue
    if causal and r > p:
      continue
    if left is not None and r < p - left:
      continue
    if right is not None and r > p + right:
      continue
    if segment_ids is not None:
      if int(segment_ids[row, i]) != int(kv_segment_ids[row, j]):
        continue
    mask[row, head, i, j] = True
  return mask


def oracle(
  q,
  k,
  v,
  mask,
  *,
  scale=None,
  softcap=None,
  sinks=None,
  keep=None,
  precision="highest",
):
  """(o, lse) in the dtype of q; `keep` [b, n, t, s] scales probabilities."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  group = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
  dot = functools.partial(jnp.einsum, precision=precision)
  x = dot("btnd,bsnd->bnts", q, k) * jnp.asarray(scale, q.dtype)
  if softcap is not None:
    x = softcap * jnp.tanh(x / softcap)
  # Less the row's largest: float16 can't hold a large sum's square.
  top = jax.lax.stop_gradient(jnp.where(mask, x, -jnp.inf).max(-1))
  if sinks is not None:
    top = jnp.maximum(top, jax.lax.stop_gradient(sinks)[None, :, None])
  top = jnp.where(jnp.isneginf(top), 0, top)
  x = x - top[..., None]
  weights = jnp.where(mask, jnp.exp(jnp.where(mask, x, 0)), 0)
  total = weights.sum(-1)
  if sinks is not None:
    total = total + jnp.exp(sinks[None, :, None] - top)
  empty = total == 0
  total = jnp.where(empty, 1, total)
  p = weights / total[..., None]
  if keep is not None:
    p = p * jnp.asarray(keep, p.dtype)
  o = dot("bnts,bsnd->btnd", p, v)
  return o, jnp.where(empty, -jnp.inf, jnp.log(total) + top)


def vjp(function, args, do, dlse):
  """((o, lse), gradients), for the cotangents do and dlse."""

  @jax.jit
  def run(args, do, dlse):
    (o, lse), pull = jax.vjp(function, *args)
    return (o, lse), pull((do.astype(o.dtype), dlse.astype(lse.dtype)))

  return run(tuple(args), do, dlse)


def wide_vjp(function, args, do, dlse):
  """`vjp` in float64, the result as numpy arrays."""
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (*args, do, dlse)]
    out = vjp(function, wide[:-2], *wide[-2:])
    return jax.tree.map(np.asarray, out)


def inputs(b, t, s, n, k, d, dv=None, dtype=jnp.float32, seed=0):
  """(q, k, v, do, dlse), drawn by numpy: jax compiles for every shape."""
  rng, dv = np.random.default_rng(seed), dv or d
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  shapes = (b, t, n, d), (b, s, k, d), (b, s, k, dv), (b, t, n, dv)
  arrays = [jnp.asarray(draw(*x).astype(dtype)) for x in shapes]
  return *arrays, jnp.asarray(draw(b, n, t))


def segments(b, t, seed=0):
  cuts = np.random.default_rng(seed).random((b, t)) < 0.3
  return jnp.asarray(np.cumsum(cuts, axis=1), jnp.int32)


def close(ours, wide, naive, factor, slack):
  """max |ours - wide| <= factor max |naive - wide| + slack; both sides."""
  ours, naive = (np.asarray(x, np.float64) for x in (ours, naive))
  finite = np.isfinite(wide)
  np.testing.assert_array_equal(np.isneginf(ours), ~finite)
  ours, naive, wide = ours[finite], naive[finite], wide[finite]
  error = np.max(np.abs(ours - wide), initial=0)
  allowed = np.max(np.abs(naive - wide), initial=0)
  assert np.isfinite(allowed), "the reference of low precision overflows"
  assert error <= factor * allowed + slack, (error, allowed)
  return error, factor * allowed + slack


def check(ours, wide, naive, slack):
  for mine, exact, low in zip(ours[0], wide[0], naive[0], strict=True):
    close(mine, exact, low, 2, slack)
  for mine, exact, low in zip(ours[1], wide[1], naive[1], strict=True):
    close(mine, exact, low, 3, slack)


def by_hand(args, do, dlse, mask, *, softcap=None, dtype=None):
  """((o, lse), gradients) by numpy, which compiles nothing.

  In float64; with a `dtype` sums are in float32 and each intermediate is
  rounded to it, as attention written out in that dtype does.

  Args:
    args: (q, k, v) or (q, k, v, sinks).
    do, dlse: cotangents; dlse may be None.
    mask: bool [b n t s].
    softcap: of the logits.
    dtype: that is rounded to.
  """

  wide = np.float64 if dtype is None else np.float32

  def near(x):
    return x if dtype is None else x.astype(dtype).astype(wide)

  q, k, v, *sinks = (near(np.asarray(x, wide)) for x in args)
  do, scale = np.asarray(do, wide).swapaxes(1, 2), wide(q.shape[-1] ** -0.5)
  heads, group = k.shape[2], q.shape[2] // k.shape[2]
  q = q.swapaxes(1, 2)
  k, v = (x.swapaxes(1, 2).repeat(group, axis=1) for x in (k, v))
  x, slope = near(near(q @ k.swapaxes(-1, -2)) * near(scale)), wide(1)
  if softcap is not None:
    unit = near(np.tanh(x / wide(softcap)))
    x, slope = near(wide(softcap) * unit), near(1 - unit**2)
  p = np.where(mask, near(np.exp(np.where(mask, x, 0))), 0)
  total = p.sum(-1)
  if sinks:
    sink = near(np.exp(sinks[0]))[:, None]
    total = total + sink
  total = near(total)
  empty = total == 0
  total = np.where(empty, 1, total)
  p = near(p / total[..., None])
  o, lse = near(p @ v), np.where(empty, -np.inf, near(np.log(total)))
  dlse = np.where(empty, 0, 0 if dlse is None else np.asarray(dlse, wide))
  dp = near(do @ v.swapaxes(-1, -2))
  delta = near(np.sum(p * dp, axis=-1)) - dlse
  dx = near(near(p * (dp - delta[..., None])) * slope * scale)

  def grouped(x):
    b, _, s, d = x.shape
    x = near(x).reshape(b, heads, group, s, d).sum(2)
    return near(x).swapaxes(1, 2)

  gradients = [
    near(dx @ k).swapaxes(1, 2),
    grouped(dx.swapaxes(-1, -2) @ q),
    grouped(p.swapaxes(-1, -2) @ do),
  ]
  if sinks:
    gradients.append(near(-np.sum(sink / total * delta, axis=(0, 2))))
  return (o.swapaxes(1, 2), lse), tuple(gradients)
