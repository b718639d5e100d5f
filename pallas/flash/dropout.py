"""Which probabilities are dropped: a hash of the key and the four indices.

The bit of an entry depends on (key, b, n, i, j) alone. So tiles of any size,
walked in any order, in the forward pass and in the backward, agree on it, and
nothing of size t x s has to be kept. Only 32-bit integer operations are used,
which every backend has, inside kernels too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray, UInt32

# Odd multipliers and shifts of 32-bit mixers of low bias, found by search
# (https://github.com/skeeto/hash-prospector).
_A, _B = 0x21F0AAAD, 0x735A2D97
_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: spreads consecutive integers


def words(key: PRNGKeyArray) -> UInt32[Array, "2"]:
  """The two words of a typed key that `keep` takes; all of its data counts.

  Example:
    >>> words(jax.random.key(3)).shape
    (2,)
  """
  low = high = jnp.uint32(0)
  for word in jax.random.key_data(key).astype(jnp.uint32).reshape(-1):
    low = _mix(low ^ word)
    high = _mix(high + low + jnp.uint32(_GOLDEN))
  return jnp.stack([low, high])


def keep(
  seed: UInt32[Array, "2"], b: Any, n: Any, i: Any, j: Any, rate: float
) -> Bool[Array, "..."]:
  """Whether entries are kept; a share `rate` of all is not.

  Args:
    seed: of `words`.
    b, n, i, j: indices of batch row, query head, query and key; ints or
      integer arrays that broadcast against each other.
    rate: the share that is dropped, in [0, 1).

  Returns:
    The mask, of the indices' common shape.

  Example:
    >>> seed = words(jax.random.key(0))
    >>> kept = keep(seed, 0, 0, jnp.arange(256)[:, None], jnp.arange(256), 0.5)
    >>> 0.49 < float(kept.mean()) < 0.51
    True
  """
  b, n, i, j = (jnp.asarray(x).astype(jnp.uint32) for x in (b, n, i, j))
  # A row is known by 64 bits: with 32, two of a few ten thousand rows would
  # drop the same keys.
  low = _mix(_mix(_mix(seed[0] ^ b) + n) ^ i)
  high = _mix(_mix(_mix(seed[1] + b) ^ n) + i)
  x = low ^ (j * jnp.uint32(_GOLDEN))
  x = (x ^ (x >> 16)) * jnp.uint32(_A)
  x = ((x ^ (x >> 15)) + high) * jnp.uint32(_B)
  x = x ^ (x >> 15)
  return x >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x):
  x = (x ^ (x >> 16)) * jnp.uint32(_A)
  x = (x ^ (x >> 15)) * jnp.uint32(_B)
  return x ^ (x >> 15)
