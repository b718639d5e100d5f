"""Block masks written out, as elements and as a picture of blocks."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from isthmus.attention.block_mask import BlockMask
from isthmus.pallas.flash.lists import overflowed


def dense(mask: BlockMask) -> Bool[Array, "#b #n t s"]:
  """The element mask; `BlockMask.to_dense`.

  Example:
    >>> print(dense(BlockMask.window((0, 1), 3))[0, 0].astype(int))
    [[1 1 0]
     [0 1 1]
     [0 0 1]]
  """
  (t, s), (bq, bk) = mask.lengths, mask.lists.block
  full, partial = (
    jnp.repeat(jnp.repeat(x, bq, axis=2), bk, axis=3)[..., :t, :s]
    for x in mask.to_blocks()
  )
  if mask.predicate is not None:
    heads = full.shape[1]
    k = (
      jnp.repeat(x, heads // x.shape[1], axis=1) if x.shape[1] > 1 else x
      for x in mask.k
    )
    partial = partial & mask.predicate(
      jnp.arange(t)[:, None],
      jnp.arange(s),
      tuple(x[..., None] for x in mask.q),
      tuple(x[..., None, :] for x in k),
    )
  return full | partial


def draw(mask: BlockMask, row: int = 0, head: int = 0, ax: Any = None) -> Any:
  """Draws the blocks of one head; `BlockMask.plot`.

  Args:
    mask: a mask that isn't traced.
    row, head: of the batch and of the heads.
    ax: matplotlib axes to draw on; default new ones.

  Returns:
    The axes.

  Example:
    >>> ax = draw(BlockMask.full(256))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('key', 'query')
  """
  import matplotlib.pyplot as plt
  from matplotlib.colors import ListedColormap

  full, partial = (np.asarray(x[row, head]) for x in mask.to_blocks())
  shades = np.where(full, 2, np.where(partial, 1, 0))
  shades[np.asarray(overflowed(mask.lists)[row, head])] = 3
  ax = plt.subplots()[1] if ax is None else ax
  (bq, bk), (qb, kb) = mask.lists.block, shades.shape
  ax.imshow(
    shades,
    cmap=ListedColormap(["white", "0.7", "tab:blue", "tab:red"]),
    vmin=0,
    vmax=3,
    extent=(0, kb * bk, qb * bq, 0),
    interpolation="nearest",
  )
  ax.set(xlabel="key", ylabel="query")
  share = np.mean(full | partial)
  ax.set_title(f"row {row}, head {head}: {share:.3f} of the blocks")
  return ax
