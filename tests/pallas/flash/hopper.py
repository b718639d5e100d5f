"""Calls of the Mosaic kernels, interpreted on a CPU, and their check."""

import contextlib
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.pallas.compat import interpreted
from isthmus.pallas.flash import mosaic
from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.lists import to_blocks
from tests.attention.oracle import by_hand, close, inputs


@dataclasses.dataclass(frozen=True)
class Call:
  """A call: lengths, heads of queries and keys, widths, what is seen."""

  lengths: tuple[int, int]
  heads: tuple[int, int] = (2, 1)
  widths: tuple[int, int] = (64, 64)
  predicate: Any = None
  softcap: float | None = None
  extras: Extras = dataclasses.field(default_factory=Extras)
  dtype: Any = jnp.bfloat16
  b: int = 1

  @property
  def options(self):
    return Options(
      scale=self.widths[0] ** -0.5,
      softcap=self.softcap,
      predicate=self.predicate,
      return_lse=True,
    )

  def arrays(self):
    """(q, k, v[, sinks]), do, dlse."""
    *args, do, dlse = inputs(
      self.b, *self.lengths, *self.heads, *self.widths, dtype=self.dtype
    )
    if self.extras.sinks is not None:
      args.append(self.extras.sinks)
    return args, do, dlse

  def mask(self):
    """bool [b n t s]: what the predicate and the lists say of each pair."""
    (t, s), (n, heads) = self.lengths, self.heads
    mask = np.ones((1, 1, t, s), bool)
    if self.predicate is not None:
      mask = self.predicate(
        np.arange(t)[:, None],
        np.arange(s),
        tuple(np.asarray(x)[..., None] for x in self.extras.q),
        tuple(
          np.repeat(x, n // heads if x.shape[1] > 1 else 1, axis=1)[:, :, None]
          for x in self.extras.k
        ),
      )
      mask = np.asarray(mask)
      mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if self.extras.lists is not None:
      bq, bk = self.extras.lists.block
      full, partial = (
        None if x is None else np.repeat(np.repeat(x, bq, 2), bk, 3)
        for x in to_blocks(self.extras.lists, -(-s // bk))
      )
      full = full[:, :, :t, :s]
      part = np.zeros_like(full) if partial is None else partial
      mask = full | (part[:, :, :t, :s] & mask)
    return np.broadcast_to(mask, (self.b, n, t, s))

  def function(self):
    """attend, of (q, k, v[, sinks])."""

    def attend(q, k, v, sinks=None):
      extras = self.extras._replace(sinks=sinks)
      return mosaic.attend(q, k, v, extras, options=self.options)

    return attend

  def vjp(self, args=None, do=None):
    """((o, lse), gradients); of changed arrays where they are given."""
    drawn, drawn_do, dlse = self.arrays()
    args, do = drawn if args is None else args, drawn_do if do is None else do

    @jax.jit
    def run(args, do, dlse):
      out, pull = jax.vjp(self.function(), *args)
      return out, pull((do, dlse))

    with on():
      out = run(tuple(args), do, dlse)
      return jax.tree.map(lambda x: np.asarray(x, np.float64), out)

  def refused(self):
    args, *_ = self.arrays()
    with on():
      return mosaic.refuse(*args[:3], self.extras, options=self.options)


def on():
  """Where the kernels run: on the GPU, or interpreted on the CPU."""
  if jax.default_backend() == "gpu":
    return contextlib.nullcontext()
  return interpreted()


def equals_oracle(call, ours=None):
  """Twice the error of attention in the dtype for o, thrice for gradients.

  The lse, which is float32, may be off by 1e-4; with a softcap, on a GPU, by
  what its approximate tanh is off by, 2**-11.
  """
  assert call.refused() is None
  args, do, dlse = call.arrays()
  mask = call.mask()
  out, gradients = call.vjp() if ours is None else ours
  how = {"mask": mask, "softcap": call.softcap}
  exact = by_hand(args, do, dlse, **how)
  low = by_hand(args, do, dlse, dtype=jnp.dtype(call.dtype), **how)
  close(out[0], exact[0][0], low[0][0], 2, 1e-5)
  slack = 1e-4
  if call.softcap is not None and jax.default_backend() == "gpu":
    slack += call.softcap * 2**-11
  close(out[1], exact[0][1], exact[0][1], 0, slack)
  assert len(gradients) == len(args)
  for mine, best, naive in zip(gradients, exact[1], low[1], strict=True):
    assert mine.shape == best.shape
    close(mine, best, naive, 3, 1e-5)
  empty = ~mask.any(-1)
  if call.extras.sinks is None:
    rows = empty.swapaxes(1, 2)
    assert (np.isneginf(out[1]) == empty).all()
    assert (out[0][rows] == 0).all() and (gradients[0][rows] == 0).all()
  return mask


def lowered(function, *args):
  """(text, names of the kernels in it) compiled for CUDA, without a GPU."""
  text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
  text = text.as_text()
  kernels = re.findall(r"\\00(flash_\w+)_mosaic_gpu\\00", text)
  assert len(kernels) == len(re.findall(r"custom_call @mosaic_gpu", text))
  return text, sorted(kernels)


def shapes(call):
  """`call.arrays()` as shapes alone."""
  return jax.eval_shape(call.arrays)
