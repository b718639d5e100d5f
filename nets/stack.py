"""Depth: one block, many layers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from isthmus.attention.sdpa import save_attention
from isthmus.nets.coupling import enter, snap
from isthmus.nets.reversible import reversible_stack

#: What `Stack.mode` may be.
MODES = ("plain", "remat", "reversible")


class Stack(nn.Module):
  """`depth` copies of a block in a row, each with parameters of its own.

  A block takes `(x, **inputs)` and returns x, or (x, aux) with aux a dict.

  With two streams, which mode "reversible" needs, each layer is
  `x1 <- x1 + f(x2)`, `x2 <- x2 + g(x1)`; both streams begin as x, and their
  mean comes out. For that a block names two of its methods in `branches`: f
  and g, each `(x, **inputs)` -> dx, or (dx, aux). Its parameters are those
  of one stream.

  Attributes:
    block: the block; its fields are those of every layer.
    depth: number of layers.
    scan: True loops over the layers: one trace and one compilation whatever
      the depth, parameters stacked along a leading axis under `blocks`.
      False writes the layers out, with parameters under `block_00`,
      `block_01`, ...: longer to compile, and XLA may work across layers.
      `stack_layers` and `unstack_layers` convert parameters.
    mode: "plain" keeps what the backward pass needs; "remat" keeps each
      layer's input and what `policy` names, and computes the rest again;
      "reversible" keeps the last layer's output, whatever the depth, and
      computes the rest backwards (`isthmus.nets.reversible`).
    policy: a policy of `jax.checkpoint` for mode "remat"; None keeps nothing.
    streams: 1 or 2; None means 2 for mode "reversible" and else 1. Two
      streams are another function of the same parameters; of two streams
      every mode computes the same.
    grid, cache: of two streams, see `reversible_stack`.

  Raises:
    ValueError: depth below 1, an unknown mode, streams that the mode can't
      have, two streams without scan; when called, a block of two streams
      without branches, with variables that are no parameters, or, in mode
      "reversible", with aux.

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
  streams: int | None = None
  grid: int | None = 12
  cache: float = 0.0

  def __post_init__(self):
    check_stack(
      self.depth,
      self.mode,
      scan=self.scan,
      streams=self.streams,
      cache=self.cache,
    )
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
    if (self.streams or 1 + (self.mode == "reversible")) == 2:
      return self._two(x, layers, shared)

    def call(block, x, own):
      return _with_aux(block(x, **own, **shared))

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

  def _two(self, x, layers, shared):
    """Of two streams."""
    block = self.block.copy(parent=None, name=None)
    if len(getattr(block, "branches", ())) != 2:
      raise ValueError(
        f"two streams need a block with two branches; {type(block).__name__}"
        " names none"
      )
    pair = enter((x, x), self.grid)
    if layers or self.is_initializing():
      # Caches are read, and parameters made, without a gradient.
      pair, aux = self._couple(pair, x.dtype, layers, shared)
    else:
      pair, aux = self._reverse(block, pair, x.dtype, shared), {}
    return ((pair[0] + pair[1]) / 2).astype(x.dtype), aux

  def _couple(self, pair, dtype, layers, shared):
    """The layers in a loop of Flax's."""

    def call(block, pair, own):
      x1, x2 = pair
      first, second = (getattr(block, name) for name in block.branches)
      df, aux_f = _with_aux(first(x2.astype(dtype), **own, **shared))
      y1 = x1 + snap(df, x1, self.grid)
      dg, aux_g = _with_aux(second(y1.astype(dtype), **own, **shared))
      return (y1, x2 + snap(dg, x2, self.grid)), {**aux_f, **aux_g}

    loop = nn.scan(
      call,
      variable_axes={True: 0},
      split_rngs={True: True},
      length=self.depth,
    )
    return loop(self.block.copy(name="blocks"), pair, layers)

  def _reverse(self, block, pair, dtype, shared):
    """The layers as a pure function of their parameters."""
    others = [c for c in self.variables if c != "params"]
    if others:
      raise ValueError(
        f"a stack of two streams has parameters alone, not {others}"
      )
    params = self.variables["params"]["blocks"]
    arrays = {k: v for k, v in shared.items() if _is_traced(v)}
    fixed = {k: v for k, v in shared.items() if k not in arrays}

    def branch(name):
      def run(p, x, *, key, state, aux):
        out = block.apply(
          {"params": p},
          x.astype(dtype),
          method=name,
          rngs=None if key is None else {"dropout": key},
          **aux,
          **fixed,
        )
        dx, extra = _with_aux(out)
        if extra:
          raise ValueError(
            f"mode {self.mode!r} of two streams has no aux; {name} returns"
            f" {', '.join(extra)}"
          )
        return dx, state

      return run

    def owned(name):
      """Those of the block's parameters that a branch reads."""
      keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
      init = lambda x, inputs: block.init(
        keys, x, method=name, **inputs, **fixed
      )
      made = jax.eval_shape(init, pair[0].astype(dtype), arrays)
      return {n: params[n] for n in made.get("params", {})}

    first, second = (branch(name) for name in block.branches)
    own = tuple(owned(name) for name in block.branches)
    if unread := set(params) - set().union(*own):
      raise ValueError(f"no branch reads the parameters {sorted(unread)}")
    remat = self.mode == "remat"
    pair, _ = reversible_stack(
      first,
      second,
      own,
      pair,
      keys=self.make_rng("dropout") if self.has_rng("dropout") else None,
      aux=arrays,
      mode=self.mode,
      grid=self.grid,
      cache=self.cache,
      policy=self.policy if remat else None,
    )
    return pair


def _with_aux(out):
  return out if isinstance(out, tuple) else (out, {})


def _is_traced(value):
  """Whether an input is a tree of arrays, not a setting."""
  leaves = jax.tree.leaves(value)
  return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)


def check_stack(
  depth: int,
  mode: str,
  *,
  scan: bool = True,
  streams: int | None = None,
  cache: float = 0.0,
) -> None:
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
  if streams not in (None, 1, 2):
    raise ValueError(f"streams is {streams}; it is 1 or 2")
  if streams == 1 and mode == "reversible":
    raise ValueError("mode 'reversible' has 2 streams; streams is 1")
  if (streams == 2 or mode == "reversible") and not scan:
    raise ValueError("two streams need scan=True; scan is False: set it too")
  if cache and mode != "reversible":
    raise ValueError(f"cache is {cache}; mode {mode!r} has nothing to cache")


def is_reversible(model: nn.Module) -> bool:
  """Whether a module, or one in its fields, has the mode "reversible".

  Then its gradients are compiled with
  `isthmus.nets.reversible.COMPILER_OPTIONS`.

  Example:
    >>> from isthmus.nets import MlpBlock
    >>> make = lambda mode: Stack(MlpBlock(16), depth=3, mode=mode)
    >>> is_reversible(nn.Sequential([make("reversible")]))
    True
    >>> is_reversible(make("remat"))
    False
  """
  if getattr(model, "mode", None) == "reversible":
    return True
  fields = dataclasses.fields(cast(Any, model))  # a dataclass unlike others
  names = {field.name for field in fields} - {"parent"}
  is_module = lambda leaf: isinstance(leaf, nn.Module)
  inner = jax.tree.leaves(
    [getattr(model, name, None) for name in names], is_leaf=is_module
  )
  return any(is_reversible(leaf) for leaf in inner if is_module(leaf))


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
