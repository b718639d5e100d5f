"""How often block routing misses what it looks for: a law, and a count.

A query q of length 1 looks for one key among keys of noise with variance 1/d
in each channel: `q . k` has variance 1/d, with a mean higher by `gap` for the
key that is sought. Of block means, that of the sought key is higher by
gap / B, the difference of two has variance 2 / (d B), and their ratio is

  snr = gap sqrt(d / (2 B)),

so that halving the block is worth sqrt(2). Keys near the sought one that look
like it help: with m of them in the block, the others higher by `lift`, the gap
is `gap + (m - 1) lift`.

Reference: https://arxiv.org/abs/2511.11571
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from isthmus.attention.moba import moba


def effective_gap(gap: float, *, cluster: int = 1, lift: float = 0.0) -> float:
  """`gap + (cluster - 1) lift`, what the block's mean is higher by, times B.

  Args:
    gap: of the mean `q . k` of the sought key to that of noise.
    cluster: m, keys of the block that belong to the sought one, itself too.
    lift: of the others' mean to that of noise.

  Example:
    >>> effective_gap(0.5, cluster=3, lift=0.25)
    1.0
  """
  if cluster < 1:
    raise ValueError(f"cluster is {cluster}; it is at least 1")
  return gap + (cluster - 1) * lift


def signal_to_noise(gap: float, *, head_dim: int, block: int) -> float:
  """`gap sqrt(d / (2 B))`.

  Args:
    gap: the effective one.
    head_dim: d.
    block: B, tokens of a block.

  Example:
    >>> signal_to_noise(1.0, head_dim=64, block=128)
    0.5
    >>> signal_to_noise(1.0, head_dim=64, block=32)
    1.0
  """
  return gap * math.sqrt(head_dim / (2 * block))


def failure_rate(snr: float, *, blocks: int = 1, slots: int = 1) -> float:
  """Probability that the sought block is not among those that are chosen.

  Against one other block it is `Phi(-snr)`. Against n it is that at least
  `slots` of them have larger scores; given the sought block's own score x,
  those are independent: `E_x P(Bin(n, Phi(-sqrt(2) snr - x)) >= slots)`.

  Args:
    snr: from `signal_to_noise`.
    blocks: n, other blocks that compete.
    slots: blocks that are chosen; of moba's top_k the own one takes a slot.

  Example:
    >>> print(f"{failure_rate(1.0):.4f}")  # Phi(-1)
    0.1587
    >>> print(f"{failure_rate(1.0, blocks=63, slots=7):.4f}")
    0.4388
  """
  if blocks < 1 or slots < 1:
    raise ValueError(f"blocks {blocks} and slots {slots} are at least 1")
  if slots > blocks:
    return 0.0
  x, weight = _normal()
  erfc = np.frompyfunc(math.erfc, 1, 1)
  above = 0.5 * erfc(x / math.sqrt(2) + snr).astype(float)
  above = np.clip(above, 1e-300, 1 - 1e-16)
  fewer = np.zeros_like(x)  # P(Bin(n, above) < slots)
  for i in range(slots):
    ways = math.lgamma(blocks + 1) - math.lgamma(i + 1)
    ways -= math.lgamma(blocks - i + 1)
    fewer += np.exp(ways + i * np.log(above) + (blocks - i) * np.log1p(-above))
  return float(np.clip(1 - np.sum(weight * fewer), 0, 1))


@functools.cache
def _normal():
  """Points and weights of a mean over a standard normal."""
  x, weight = np.polynomial.hermite_e.hermegauss(200)
  return x, weight / weight.sum()


def sample_failure(
  key: PRNGKeyArray,
  *,
  gap: float,
  head_dim: int,
  block: int,
  blocks: int = 1,
  slots: int = 1,
  cluster: int = 1,
  lift: float = 0.0,
  trials: int = 1000,
  batch: int = 50,
  impl: str | None = None,
) -> float:
  """Share of trials in which `moba` doesn't read the sought block.

  Each trial draws a query, keys of noise, and where the sought block is; the
  values tell what was read.

  Args:
    key: of the draws.
    gap, lift, cluster: of the sought key and its like, see `effective_gap`.
    head_dim, block: sizes.
    blocks: other blocks that compete.
    slots: blocks that are read.
    trials: rounded up to whole batches.
    batch: trials at once, in memory of `batch (blocks + 1) block head_dim`.
    impl: of `moba`.

  Example:
    >>> key = jax.random.key(0)
    >>> sample_failure(key, gap=9.0, head_dim=16, block=4, trials=50)
    0.0
  """
  if not 1 <= cluster <= block:
    raise ValueError(f"cluster is {cluster}; it lies in [1, block = {block}]")
  for name, x in (("trials", trials), ("batch", batch)):
    if x < 1:
      raise ValueError(f"{name} is {x}; it is at least 1")
  keys = jax.random.split(key, -(-trials // batch))
  lost = _sample(
    keys,
    jnp.float32(gap),
    jnp.float32(lift),
    jnp.int32(cluster),
    sizes=(batch, blocks + 1, block, head_dim),
    slots=slots,
    impl=impl,
  )
  return float(lost) / (len(keys) * batch)


@functools.partial(jax.jit, static_argnames=("sizes", "slots", "impl"))
def _sample(keys, gap, lift, cluster, *, sizes, slots, impl):
  """Number of trials that miss."""
  b, g, block, d = sizes

  def some(key):
    ours, noise, place = jax.random.split(key, 3)
    q = jax.random.normal(ours, (b, d))
    q = q / jnp.linalg.norm(q, axis=-1, keepdims=True)
    k = jax.random.normal(noise, (b, g, block, d)) * d**-0.5
    home = jax.random.randint(place, (b,), 0, g)
    raised = jnp.where(jnp.arange(block) < cluster, lift, 0).at[0].set(gap)
    sought = home[:, None] == jnp.arange(g)
    k = k + (sought[..., None] * raised)[..., None] * q[:, None, None]
    v = jnp.broadcast_to(sought[..., None], (b, g, block)).astype(k.dtype)
    # With equal weights, o is above 0 where the sought block was read.
    o = moba(
      q[:, None, None],
      k.reshape(b, -1, 1, d),
      v.reshape(b, -1, 1, 1),
      block=block,
      top_k=slots,
      causal=False,
      scale=0.0,
      impl=impl,
    )
    return jnp.sum(o == 0)

  return jnp.sum(jax.lax.map(some, keys))


def fit_gap(
  failures: Sequence[float],
  *,
  head_dim: int,
  block: Sequence[int],
  blocks: Sequence[int],
  slots: Sequence[int],
) -> tuple[float, float]:
  """The effective gap whose law is nearest to measured rates of failure.

  Args:
    failures: measured, one each of the following.
    head_dim: d of all.
    block, blocks, slots: sizes of each, see `failure_rate`.

  Returns:
    (gap, R^2 of the rates), the gap by least squares.

  Example:
    >>> sizes = {"block": (8, 32), "blocks": (63, 15), "slots": (8, 2)}
    >>> rates = [0.0525, 0.4381]
    >>> gap, r2 = fit_gap(rates, head_dim=64, **sizes)
    >>> round(gap, 2), round(r2, 3)
    (1.0, 1.0)
  """
  measured = np.asarray(failures, float)

  def law(gap):
    return np.array(
      [
        failure_rate(
          signal_to_noise(gap, head_dim=head_dim, block=b), blocks=n, slots=s
        )
        for b, n, s in zip(block, blocks, slots, strict=True)
      ]
    )

  def error(gap):
    return float(np.sum((law(gap) - measured) ** 2))

  # Coarse to fine: the error is smooth, and flat where nothing fails.
  low, high = 0.0, 16 * math.sqrt(max(block) / head_dim)
  for _ in range(6):
    grid = np.linspace(low, high, 21)
    best = int(np.argmin([error(x) for x in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, 20)]
  gap = float((low + high) / 2)
  spread = float(np.sum((measured - measured.mean()) ** 2))
  return gap, 1 - error(gap) / spread if spread else math.nan
