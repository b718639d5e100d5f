"""Large volumes through a network for small ones, window by window."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from isthmus.pallas.precision import accumulator


def sliding_window(
  apply: Callable[[jax.Array], Any],
  volume: Float[Array, "*space c"],
  *,
  window: int | tuple[int, ...],
  overlap: float = 0.5,
  blend: str = "gaussian",
  batch: int = 1,
) -> Float[Array, "*space n"]:
  """Weighted means of what a network gives for windows that overlap.

      y_v = sum_w a_w(v) apply(window_w)_v,   sum_w a_w(v) = 1 at every voxel v

  Windows lie on a regular grid from edge to edge, at most
  `window (1 - overlap)` voxels apart. Their weights a are products of one
  factor an axis, divided by the factors' sum over the windows, so that a voxel
  at the edge of every window that holds it gets its full share. Windows are
  run in a loop: memory is that of one batch of windows and of the result. Jit
  it, with `apply` closing over the parameters or within a function of them.

  Args:
    apply: windows [batch, *window, c] -> [batch, *window, n], or a pair of
      that and anything, which is dropped.
    volume: [z, y, x, c], or with any other number of axes of space. Where it
      is smaller than a window it is put into the middle of zeros.
    window: voxels along each axis, one number for all or one each.
    overlap: share of a window that the next one covers at least, in [0, 1).
    blend: "gaussian" weighs a window's middle more than its edges, where a
      network sees least; its standard deviation is an eighth of the window.
      "constant" weighs all alike.
    batch: windows in a batch.

  Returns:
    The blended result, of apply's dtype, summed in at least float32.

  Raises:
    ValueError: sizes below 1, an overlap outside [0, 1), another blend, a
      window of another number of axes, an apply that changes a window's shape.

  Example:
    >>> volume = jnp.arange(24.0).reshape(4, 6, 1)
    >>> y = sliding_window(lambda x: 2 * x, volume, window=3, batch=4)
    >>> bool(jnp.allclose(y, 2 * volume)), y.shape
    (True, (4, 6, 1))
  """
  *space, channels = volume.shape
  size = _check(window, len(space), overlap, blend, batch)
  pads = [max(s - n, 0) for n, s in zip(space, size, strict=True)]
  before = [p // 2 for p in pads]
  padded = jnp.pad(
    volume,
    [*((a, p - a) for a, p in zip(before, pads, strict=True)), (0, 0)],
  )
  axes = [
    _axis(n, s, overlap, blend)
    for n, s in zip(padded.shape[:-1], size, strict=True)
  ]
  like = jax.ShapeDtypeStruct((batch, *size, channels), volume.dtype)
  call = functools.partial(_first, apply)
  out = jax.eval_shape(call, like)
  if out.shape[:-1] != like.shape[:-1]:
    raise ValueError(
      f"apply gives {out.shape} for windows {like.shape}; only the last axis"
      " may change"
    )
  wide = accumulator(out.dtype)
  weights = [jnp.asarray(w, wide) for _, w in axes]
  # Places on each axis of every window; the last batch is filled up with the
  # first window, without weight.
  places = np.indices([len(starts) for starts, _ in axes])
  places = places.reshape(len(space), -1).T
  missing = -len(places) % batch
  share = np.repeat([1.0, 0.0], [len(places), missing])
  places = np.concatenate([places, np.zeros((missing, len(space)), int)])
  starts = [s[p] for (s, _), p in zip(axes, places.T, strict=True)]
  starts.append(np.zeros_like(starts[0]))  # of the channels

  def step(total, xs):
    corners, places, share = xs
    cut = lambda corner: jax.lax.dynamic_slice(
      padded, tuple(corner), (*size, channels)
    )
    y = call(jax.vmap(cut)(corners))

    def add(i, total):
      factor = share[i]
      for axis, table in enumerate(weights):
        shape = (-1, *(1,) * (len(space) - axis))
        factor = factor * table[places[i, axis]].reshape(shape)
      corner = tuple(corners[i])
      piece = factor * y[i].astype(wide)
      old = jax.lax.dynamic_slice(total, corner, piece.shape)
      return jax.lax.dynamic_update_slice(total, old + piece, corner)

    return jax.lax.fori_loop(0, batch, add, total), None

  xs = (
    jnp.asarray(np.stack(starts, -1), jnp.int32).reshape(
      -1, batch, len(starts)
    ),
    jnp.asarray(places, jnp.int32).reshape(-1, batch, len(space)),
    jnp.asarray(share, wide).reshape(-1, batch),
  )
  zeros = jnp.zeros((*padded.shape[:-1], out.shape[-1]), wide)
  total, _ = jax.lax.scan(step, zeros, xs)
  box = (slice(a, a + n) for a, n in zip(before, space, strict=True))
  return total[tuple(box)].astype(out.dtype)


def _axis(n, size, overlap, blend) -> tuple[np.ndarray, np.ndarray]:
  """(first voxels of the windows, their weights [windows, size])."""
  stride = max(1, math.floor(size * (1 - overlap)))
  count = math.ceil((n - size) / stride) + 1
  starts = np.round(np.linspace(0, n - size, count)).astype(int)
  shape = np.ones(size)
  if blend == "gaussian":
    away = np.arange(size) - (size - 1) / 2
    shape = np.exp(-0.5 * (8 * away / size) ** 2)
  total = np.zeros(n)
  for start in starts:
    total[start : start + size] += shape
  return starts, np.stack([shape / total[s : s + size] for s in starts])


def _first(apply, x) -> jax.Array:
  y = apply(x)
  return y[0] if isinstance(y, tuple) else y


def _check(window, rank, overlap, blend, batch) -> tuple[int, ...]:
  size = (window,) * rank if isinstance(window, int) else tuple(window)
  if len(size) != rank:
    raise ValueError(f"window is {window}; the volume has {rank} axes of space")
  if min(size) < 1 or batch < 1:
    raise ValueError(
      f"window is {window} and batch {batch}; they are at least 1"
    )
  if not 0 <= overlap < 1:
    raise ValueError(f"overlap is {overlap}; it lies in [0, 1)")
  if blend not in ("gaussian", "constant"):
    raise ValueError(f"blend is {blend!r}, neither 'gaussian' nor 'constant'")
  return size
