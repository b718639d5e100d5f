"""Depth made of different blocks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from isthmus.attention.sdpa import save_attention


class Chain(nn.Module):
  """Blocks in a row, each with fields and parameters of its own.

  A block takes `(x, **inputs)` and returns x, or (x, aux) with aux a dict.
  Parameters are under `block_00`, `block_01`, ..., as those of a `Stack`
  whose layers are written out.

  Attributes:
    blocks: the blocks, in order.
    mode: "plain" keeps what the backward pass needs; "remat" keeps each
      block's input and what `policy` names, and computes the rest again.
    policy: of `jax.checkpoint` for mode "remat"; None keeps nothing.

  Raises:
    ValueError: no block, or an unknown mode, at construction.

  Example:
    >>> from isthmus.nets.mlp import MlpBlock
    >>> chain = Chain((MlpBlock(16), MlpBlock(32)))
    >>> (y, aux), variables = chain.init_with_output(
    ...   jax.random.key(0), jnp.ones((2, 8))
    ... )
    >>> variables["params"]["block_01"]["mlp"]["up"]["kernel"].shape
    (8, 32)
  """

  blocks: tuple[nn.Module, ...]
  mode: str = "plain"
  policy: Callable[..., Any] | None = save_attention

  def __post_init__(self):
    check_chain(len(self.blocks), self.mode)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x: Any,
    *,
    layers: Mapping[str, Sequence[Any]] | None = None,
    **shared: Any,
  ) -> tuple[Any, dict[str, tuple[Any, ...]]]:
    """Runs the blocks.

    Args:
      x: what passes from block to block.
      layers: keyword inputs of which each block gets its own: one entry each.
      **shared: keyword inputs that every block gets.

    Returns:
      (x, aux): of each entry of the blocks' aux, a tuple of theirs.

    Raises:
      ValueError: inputs of another number than the blocks'.
    """
    for name, own in (layers or {}).items():
      if len(own) != len(self.blocks):
        raise ValueError(
          f"{len(own)} inputs {name!r} for {len(self.blocks)} blocks"
        )

    def call(block, x, own):
      out = block(x, **own, **shared)
      return out if isinstance(out, tuple) else (out, {})

    if self.mode == "remat":
      call = nn.remat(call, policy=self.policy)
    auxes: dict[str, list[Any]] = {}
    for i, block in enumerate(self.blocks):
      own = {name: inputs[i] for name, inputs in (layers or {}).items()}
      x, aux = call(block.copy(name=f"block_{i:02d}"), x, own)
      for name, value in aux.items():
        auxes.setdefault(name, []).append(value)
    return x, {name: tuple(values) for name, values in auxes.items()}


def check_chain(depth: int, mode: str) -> None:
  """Raises ValueError for what a Chain can't be built of.

  Example:
    >>> check_chain(2, "reversible")
    Traceback (most recent call last):
    ValueError: mode 'reversible' is none of plain, remat
  """
  if depth < 1:
    raise ValueError("a chain has at least 1 block; there is none")
  if mode not in ("plain", "remat"):
    raise ValueError(f"mode {mode!r} is none of plain, remat")
