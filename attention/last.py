"""What the last queries of a long row attend to."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.attention.pooling import LOGITS
from isthmus.pallas.dispatch import Impl, Op
from isthmus.pallas.importance import mosaic
from isthmus.pallas.importance.api import Options as ImportanceOptions
from isthmus.pallas.scores.api import Options


def last_importance(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  rows: int,
  causal: bool,
  scale: float | None = None,
  impl: Any = None,
) -> Float[Array, "b n s"]:
  """The mean over the last queries of their softmax over keys.

  `a_j = mean_i exp(x_ij - lse_i)`, `x_ij = scale q_i . k_j`, i being the last
  `rows` queries, or all of fewer; in float32.

  Args:
    q: queries, the last of which stands at the last key.
    k: keys.
    rows: how many queries.
    causal: a query sees keys up to its own.
    scale: default d ** -0.5.
    impl: of `LOGITS` and `IMPORTANCE`, an implementation's name.

  Example:
    >>> q = k = jnp.zeros((1, 4, 1, 8))
    >>> last_importance(q, k, rows=1, causal=True).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
  """
  q, scale = _last(q, rows, scale)
  _, lse = LOGITS(q, k, options=_lse(causal, scale), impl=impl)
  options = ImportanceOptions(causal, scale)
  return IMPORTANCE(q, k, lse, options=options, impl=impl) / q.shape[1]


def importance_and_means(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  rows: int,
  causal: bool,
  scale: float | None = None,
  impl: Any = None,
) -> tuple[Float[Array, "b n s"], Float[Array, "b m n d"]]:
  """`last_importance`, and the means of all query blocks, found beside it.

  To read all queries takes memory's time, to look from the last ones that of
  arithmetic: a kernel that does both takes less than one for each.

  Args:
    q, k, rows, causal, scale, impl: as in `last_importance`.

  Returns:
    (importance, `pool_blocks(q, BLOCK)`); the means may differ by a rounding.

  Example:
    >>> q = k = jnp.ones((1, 300, 1, 8))
    >>> found, means = importance_and_means(q, k, rows=1, causal=True)
    >>> found.shape, means[0, :, 0, 0].tolist()
    ((1, 1, 300), [1.0, 1.0, 0.34375])
  """
  some, scale = _last(q, rows, scale)
  _, lse, means = LOGITS(
    some, k, options=_lse(causal, scale), tokens=q, impl=impl
  )
  options = ImportanceOptions(causal, scale)
  found = IMPORTANCE(some, k, lse, options=options, impl=impl)
  return found / some.shape[1], means


def last_mass(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  rows: int,
  block: int,
  causal: bool,
  scale: float | None = None,
  impl: Any = None,
) -> Float[Array, "b n m"]:
  """The sums of `last_importance` over blocks of keys, in one pass over them.

  Args:
    q, k, rows, causal, scale: as in `last_importance`.
    block: of how many keys; the last one may be short.
    impl: of `LOGITS`, an implementation's name.

  Example:
    >>> q = k = jnp.zeros((1, 4, 1, 8))
    >>> last_mass(q, k, rows=1, block=3, causal=True).tolist()
    [[[0.75, 0.25]]]
  """
  q, scale = _last(q, rows, scale)
  side = math.gcd(block, 128)
  options = Options(side, "sum", causal, scale)
  found, lse = LOGITS(q, k, options=options, impl=impl)
  # -inf of a query that sees nothing gives nothing.
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
  found = jnp.exp(found - lse[:, :, None]).mean(axis=3)
  per = block // side
  found = jnp.pad(found, ((0, 0), (0, 0), (0, -found.shape[2] % per)))
  return found.reshape(*found.shape[:2], -1, per).sum(axis=3)


def _lse(causal, scale):
  return Options(128, "none", causal, scale)


def _last(q, rows, scale):
  scale = q.shape[3] ** -0.5 if scale is None else scale
  return q[:, max(q.shape[1] - rows, 0) :], float(scale)


#: `isthmus.pallas.importance.ref.importance` and what else does it.
IMPORTANCE = Op(
  "importance",
  (
    Impl("mosaic", mosaic.importance, mosaic.refuse),
    Impl("xla", "isthmus.pallas.importance.ref:importance"),
  ),
  {"gpu": ("mosaic", "xla"), "cpu": ("xla",), "tpu": ("xla",)},
)
