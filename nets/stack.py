"""Depth: one block, many layers."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from isthmus.attention.sdpa import save_attention

#: What `Stack.mode` may be.
MODES = ("plain", "remat")


class Stack(nn.Module):
  """`depth` copies of a block in a row, each with parameters of its own.

  A block takes `(x, **inputs)` and returns x, or (x, aux) with aux a dict.

  Attributes:
    block: the block; its fields are those of every layer.
    depth: number of layers.
    scan: True loops over the layers: one trace and one compilation whatever
      the depth, parameters stacked along a leading axis under `blocks`.
      False writes the layers out, with parameters under `block_00`,
      `block_01`, ...: longer to compile, and XLA may work across layers.
      `stack_layers` and `unstack_layers` convert parameters.
    mode: "plain" keeps what the backward pass needs; "remat" keeps each
      layer's input and what `policy` names, and computes the rest again.
    policy: a policy of `jax.checkpoint` for mode "remat"; None keeps nothing.

  Raises:
    ValueError: depth below 1, or an unknown mode.

  Example:
    >>> from isthmus.nets.mlp import MlpBlock
    >>> stack = Stack(MlpBlock(16), depth=3)
    >>> (y, aux), variables = stack.init_with_output(
    ...   jax.random.key(0), jnp.ones((2, 8))
    ... )
    >>> variables["params"]["blocks"]["mlp"]["up"]["kernel"].shape
    (3, 8, 16)
  """

  block: nn.Module
  depth: int
  scan: bool = True
  mode: str = "plain"
  policy: Callable[..., Any] | None = save_attention

  def __post_init__(self):
    check_stack(self.depth, self.mode)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Any, *, layers: Mapping[str, Any] | None = None, **shared: Any
  ) -> tuple[Any, dict[str, Any]]:
    """Runs the layers.

    Args:
      x: what passes from block to block.
      layers: keyword inputs of which each layer gets its own: every leaf has
        a leading axis of `depth`.
      **shared: keyword inputs that every layer gets.

    Returns:
      (x, aux): each entry of the blocks' aux, stacked along a leading axis
      of `depth`.
    """
    layers = dict(layers or {})
    for leaf in jax.tree.leaves(layers):
      if leaf.shape[:1] != (self.depth,):
        raise ValueError(
          f"an input of {self.depth} layers has the shape {leaf.shape}"
        )

    def call(block, x, own):
      out = block(x, **own, **shared)
      return out if isinstance(out, tuple) else (out, {})

    if self.mode == "remat":
      # A loop's passes can't be merged by XLA; layers written out can.
      call = nn.remat(call, policy=self.policy, prevent_cse=not self.scan)
    if self.scan:
      loop = nn.scan(
        call,
        variable_axes={True: 0},
        split_rngs={True: True},
        length=self.depth,
      )
      return loop(self.block.copy(name="blocks"), x, layers)
    auxes = []
    for i in range(self.depth):
      own = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
      x, aux = call(self.block.copy(name=f"block_{i:02d}"), x, own)
      auxes.append(aux)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)


def check_stack(depth: int, mode: str) -> None:
  """Raises ValueError for what a Stack can't be built of.

  Example:
    >>> check_stack(0, "plain")
    Traceback (most recent call last):
    ValueError: depth is 0; it must be at least 1
  """
  if depth < 1:
    raise ValueError(f"depth is {depth}; it must be at least 1")
  if mode not in MODES:
    raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")


def stack_layers(params: Any) -> Any:
  """Parameters of `scan=False` as `scan=True` has them, at any depth of a tree.

  Every dict that holds `block_00`, `block_01`, ... gets `blocks` instead.

  Example:
    >>> first, second = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    >>> stacked = stack_layers({"block_00": first, "block_01": second})
    >>> stacked["blocks"]["w"].tolist()
    [[0.0, 0.0], [1.0, 1.0]]
  """
  if not isinstance(params, Mapping):
    return params
  names = [n for n in params if n.startswith("block_") and n[6:].isdigit()]
  names.sort(key=lambda n: int(n[6:]))
  rest = {n: stack_layers(p) for n, p in params.items() if n not in names}
  if names:
    layers = [stack_layers(params[n]) for n in names]
    rest["blocks"] = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
  return rest


def unstack_layers(params: Any) -> Any:
  """Parameters of `scan=True` as `scan=False` has them.

  Example:
    >>> layers = unstack_layers({"blocks": {"w": jnp.arange(2.0)}})
    >>> {name: float(layer["w"]) for name, layer in layers.items()}
    {'block_00': 0.0, 'block_01': 1.0}
  """
  if not isinstance(params, Mapping):
    return params
  rest = {n: unstack_layers(p) for n, p in params.items() if n != "blocks"}
  if "blocks" in params:
    blocks = unstack_layers(params["blocks"])
    depth = jax.tree.leaves(blocks)[0].shape[0]
    for i in range(depth):
      rest[f"block_{i:02d}"] = jax.tree.map(lambda x, i=i: x[i], blocks)
  return rest
