"""Re-ttention: sparse attention that remembers what a dense step saw.

At a few steps of a sampler attention is dense. Two things are kept of it: for
each query the share rho of its softmax's mass that a static mask would have
seen, and the residual R, what the mask would have missed. The steps between
attend within the mask alone, and put both back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from isthmus.attention.sdpa import attention


class Reshaped(NamedTuple):
  """What a layer carries from step to step.

  Attributes:
    ratio: float32 [b, n, t], rho.
    residual: [b, t, n, dv], R, of the values' dtype.

  Example:
    >>> reshaped(jnp.ones((1, 4, 2, 8))).ratio.shape
    (1, 2, 4)
  """

  ratio: Any
  residual: Any


def reshaped(o: Float[Array, "b t n dv"]) -> Reshaped:
  """The state before the first step: all mass within the mask, R = 0.

  Args:
    o: of the shape and dtype of the layer's output.

  Example:
    >>> reshaped(jnp.ones((1, 4, 2, 8))).residual.sum().item()
    0.0
  """
  b, t, n, _ = o.shape
  return Reshaped(jnp.ones((b, n, t), jnp.float32), jnp.zeros_like(o))


def rettention(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  state: Reshaped,
  *,
  dense: Bool[Array, ""] | bool,
  ramp: float = 0.04,
  ratio: bool = True,
  scale: float | None = None,
  impl: Any = None,
  **sparse: Any,
) -> tuple[Float[Array, "b t n dv"], Reshaped]:
  """One step of attention within a mask, or dense to learn what that misses.

  A dense step gives `o = A V` and keeps `rho = exp(lse_M - lse)` and
  `R = o - rho A_M V`, with A_M the softmax over the mask and lse, lse_M the
  two denominators' logarithms. A sparse step gives `o = rho A_M V + R` and
  then lets rho grow, `rho <- min(1, rho + ramp)`, for what was missed gets
  stale. Right after a dense step, of the same inputs, both give the same.

  Args:
    q, k, v: this step's.
    state: that of the step before, or `reshaped`.
    dense: whether this step is dense; may be traced.
    ramp: by which rho grows at a sparse step.
    ratio: if False rho is 1 throughout, `R = o - A_M V`: a plain cache of the
      residual, to compare with. It is often as good.
    scale, impl: as in `attention`.
    **sparse: what makes the mask: `mask`, `window`, positions and the like,
      as in `attention`.

  Returns:
    (o, the state for the next step).

  Raises:
    ValueError: nothing makes a mask, or a ramp below 0.

  Example:
    >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 16, 2, 8))
    >>> state = reshaped(v)
    >>> first, state = rettention(q, k, v, state, dense=True, window=2)
    >>> second, _ = rettention(q, k, v, state, dense=False, window=2)
    >>> bool(jnp.allclose(first, second, atol=1e-5))
    True

  Reference: Re-ttention, https://arxiv.org/abs/2505.22918.
  """
  if not sparse:
    raise ValueError("nothing makes a mask: give `window`, or `mask`")
  if ramp < 0:
    raise ValueError(f"the ramp is {ramp}; it must not be below 0")
  wide = state.ratio.dtype
  settings: dict[str, Any] = {"scale": scale, "impl": impl, "return_lse": True}

  def times(rho, o):
    rho = jnp.swapaxes(rho, 1, 2)[..., None] if ratio else 1.0
    return rho * o.astype(wide)

  def learn(state):
    del state
    o, lse = attention(q, k, v, **settings)
    within, part = attention(q, k, v, **settings, **sparse)
    rho = jnp.exp(part - lse).astype(wide)
    residual = o.astype(wide) - times(rho, within)
    return o, Reshaped(rho, residual.astype(o.dtype))

  def reuse(state):
    within, _ = attention(q, k, v, **settings, **sparse)
    o = times(state.ratio, within) + state.residual.astype(wide)
    grown = jnp.minimum(state.ratio + ramp, 1.0)
    return o.astype(within.dtype), state._replace(ratio=grown)

  return jax.lax.cond(dense, learn, reuse, state)


def dense_steps(
  steps: int, *, first: int = 5, every: int = 5
) -> Bool[np.ndarray, " steps"]:
  """Which steps of a sampler are dense: the first ones, then every few.

  Args:
    steps: of the sampler.
    first: steps at the start that are all dense.
    every: a dense step comes each so many after them.

  Example:
    >>> np.flatnonzero(dense_steps(20)).tolist()
    [0, 1, 2, 3, 4, 5, 10, 15]
  """
  step = np.arange(steps)
  return (step < first) | ((step - first) % every == 0)


def frame_order(
  frames: int, per_frame: int, *, text: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of a video by place, so that a band over places is one of tokens.

  Tokens come as text, then frame by frame. A mask that says which places of a
  frame see which, in all frames alike, touches blocks all over. In the order
  of places, with all frames of a place side by side, it is a band.

  Args:
    frames: how many.
    per_frame: tokens of each.
    text: tokens before them.

  Returns:
    (order, place): `order[j]` is the token that comes j-th; `place[j]` its
    place in its frame, -1 for text.

  Example:
    >>> order, place = frame_order(2, 3, text=1)
    >>> order.tolist(), place.tolist()
    ([0, 1, 4, 2, 5, 3, 6], [-1, 0, 0, 1, 1, 2, 2])
  """
  index = np.arange(frames * per_frame).reshape(frames, per_frame)
  order = np.concatenate([np.arange(text), text + index.T.reshape(-1)])
  place = np.repeat(np.arange(per_frame), frames)
  place = np.concatenate([np.full(text, -1), place])
  return order.astype(np.int32), place.astype(np.int32)


def band_width(tokens: int, keep: float) -> int:
  """The tokens on either side that a band of `keep` of all has.

  `floor(keep tokens) // 2`.

  Raises:
    ValueError: a share outside of (0, 1].

  Example:
    >>> band_width(1024, 0.03125)
    16
  """
  if not 0 < keep <= 1:
    raise ValueError(f"keep is {keep}, not in (0, 1]")
  return int(keep * tokens) // 2
