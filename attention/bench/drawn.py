"""Queries and keys that are drawn, with what attention of trained models has.

Normal arrays attend to everything alike: no choice of blocks is of use there.
These have near keys, a sink, heavy keys and topics, as written out below.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

#: (least, largest) strength of each part, in logits; heads draw theirs between.
STRENGTHS = {
  "near": (14.0, 22.0),
  "topic": (6.0, 12.0),
  "sink": (12.0, 20.0),
  "heavy": (8.0, 14.0),
}
#: Base of the wavelengths by which near keys are near.
THETA = 5e5
#: Tokens of a passage, on average; topics that passages have; tokens that have
#: one heavy key among them, on average; tokens of the sink.
PASSAGE, TOPICS, RARE, SINK = 1024, 64, 2048, 4


def structured(
  seed: int,
  length: int,
  *,
  heads: int = 32,
  kv_heads: int = 8,
  width: int = 128,
  dtype: Any = jnp.bfloat16,
) -> tuple[
  Float[Array, "1 t n d"], Float[Array, "1 t k d"], Float[Array, "1 t k d"]
]:
  """(q, k, v) of one row, for the default scale, d ** -0.5.

  The logit of a query i of head n and a key j of its kv head is

      x_ij = near_n (4 / d) sum_m cos(w_m (i - j)) + topic_n z_i . z_j
             + sink_n [j < 4] + heavy_n h_j + e_i . e_j,

  - near: `w_m = 5e5 ** (-4 m / d)`, m < d / 4: exp(x) falls about as a power
    of the distance, the -near / ln 5e5-th, with a long tail;
  - topic: tokens stand in passages of 1024 on average, each of one of 64
    topics with unit vectors z in d / 8 dimensions, drawn for each kv head:
    what its heads share is of that low rank;
  - sink: the first 4 keys; heavy: `h_j` is 1 for one key of 2048, drawn for
    each kv head, and else 0, which makes vertical lines;
  - noise: e in the dimensions that are left, of variance 1 in x.

  near, topic, sink and heavy are drawn for each query head, uniformly in
  [14, 22], [6, 12], [12, 20] and [8, 14]. Values are normal.

  Args:
    seed: of all that is drawn; another length draws anew.
    length: t.
    heads, kv_heads: n and k.
    width: d, a multiple of 8, at least 16.
    dtype: of the arrays.

  Raises:
    ValueError: a width that doesn't split, heads that don't.

  Example:
    >>> q, k, v = structured(0, 64, heads=4, kv_heads=2, width=16)
    >>> q.shape, k.shape
    ((1, 64, 4, 16), (1, 64, 2, 16))
  """
  check_sizes(heads, kv_heads, width)
  return _draw(jax.random.key(seed), length, heads, kv_heads, width, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _draw(key, length, heads, kv_heads, width, dtype):
  keys = jax.random.split(key, 3)
  passage = jnp.cumsum(jax.random.bernoulli(keys[0], 1 / PASSAGE, (length,)))
  topic = jax.random.randint(keys[1], (length,), 0, TOPICS)[passage]
  position = jnp.arange(length, dtype=jnp.float32)
  pairs, rank = width // 4, width // 8
  angle = position[:, None] * THETA ** (
    -jnp.arange(pairs, dtype=jnp.float32) / pairs
  )
  near = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1) * pairs**-0.5
  rest = width - 2 * pairs - rank - 2
  group = heads // kv_heads

  def one(key):
    """(q [t g d], k [t d], v [t d]) of a kv head."""
    draws = jax.random.split(key, 6)
    strength = {
      name: jax.random.uniform(draw, (group, 1), minval=low, maxval=high)
      for (name, (low, high)), draw in zip(
        STRENGTHS.items(), jax.random.split(draws[0], 4), strict=True
      )
    }
    z = jax.random.normal(draws[1], (TOPICS, rank))
    z = (z / jnp.linalg.norm(z, axis=-1, keepdims=True))[topic]
    noise = functools.partial(jax.random.normal, dtype=jnp.float32)
    k = jnp.concatenate(
      [
        near,
        z,
        (position < SINK)[:, None],
        jax.random.bernoulli(draws[2], 1 / RARE, (length, 1)),
        noise(draws[3], (length, rest)) * rest**-0.25,
      ],
      axis=-1,
    )
    ones = jnp.ones((length, group, 1))
    q = jnp.concatenate(
      [
        strength["near"] * near[:, None],
        strength["topic"] * z[:, None],
        strength["sink"] * ones,
        strength["heavy"] * ones,
        noise(draws[4], (length, group, rest)) * rest**-0.25,
      ],
      axis=-1,
    )
    # The scale is undone; the vectors stay about as long as each other.
    v = jax.random.normal(draws[5], (length, width), dtype)
    big = width**0.25
    return (q * big / 3).astype(dtype), (k * big * 3).astype(dtype), v

  q, k, v = jax.lax.map(one, jax.random.split(keys[2], kv_heads))
  q = jnp.moveaxis(q, 0, 1).reshape(1, length, heads, width)
  return q, jnp.moveaxis(k, 0, 1)[None], jnp.moveaxis(v, 0, 1)[None]


def check_sizes(heads: int, kv_heads: int, width: int) -> None:
  """Raises ValueError for what `structured` can't be of.

  Example:
    >>> check_sizes(32, 8, 12)
    Traceback (most recent call last):
    ValueError: width is 12; it is a multiple of 8, 16 or more
  """
  if width % 8 or width < 16:
    raise ValueError(f"width is {width}; it is a multiple of 8, 16 or more")
  if kv_heads < 1 or heads < 1 or heads % kv_heads:
    raise ValueError(f"{heads} heads don't split over {kv_heads} kv heads")
