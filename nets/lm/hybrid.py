"""A decoder whose layers attend in different ways.

Local layers (a sliding window, with rotary positions) and distant ones (all
keys, or those of chosen blocks, without positions) take turns; the last few
may be dense.

Reference: https://arxiv.org/abs/2511.11571 (half of the layers with a window of
256), https://arxiv.org/abs/2502.13189 (the last few dense)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from isthmus.attention.layer import LayerCache, check_moba, parts
from isthmus.attention.mask import check_window
from isthmus.attention.moba import moba
from isthmus.attention.sdpa import attention
from isthmus.nets.chain import Chain, check_chain
from isthmus.nets.transformer import Decoder


@dataclasses.dataclass(frozen=True)
class Layer:
  """How one layer of a `HybridDecoder` attends.

  Attributes:
    attend: the mechanism: `isthmus.attention.attention`, of which a
      `functools.partial` binds a window (256 keys are `window=(255, 0)`), or
      `functools.partial(isthmus.attention.moba, block=..., top_k=...)`.
    rope: rotary positions for its queries and keys; False is none at all.
    kconv: width of the convolution of its keys, or None.
    dense_decode: of moba, see `Attention`.

  Raises:
    ValueError: settings that don't go together, at construction.

  Example:
    >>> import functools
    >>> far = Layer(functools.partial(moba, block=128, top_k=8), rope=False)
    >>> far.keys_read(8192), Layer().keys_read(8192)
    (904.0, 4096.0)
  """

  attend: Callable[..., Any] = attention
  rope: bool = True
  kconv: int | None = None
  dense_decode: bool = False

  def __post_init__(self):
    check_moba(self.attend, dense_decode=self.dense_decode)
    if self.kconv is not None and self.kconv < 1:
      raise ValueError(f"kconv is {self.kconv}; it is at least 1, or None")

  def keys_read(self, seq_len: int) -> float:
    """Keys that a query reads on the mean, itself counting one half.

    What isn't known of a mechanism counts as dense: `seq_len / 2`.
    """
    func, bound = parts(self.attend)
    at = np.arange(seq_len)
    read = at + 0.5
    if func is moba:
      block, others = bound["block"], bound["top_k"] - 1
      read = at % block + 0.5 + block * np.minimum(at // block, others)
    elif func is attention:
      left = (check_window(bound.get("window")) or (None, None))[0]
      read = read if left is None else np.minimum(read, left + 0.5)
    return float(read.mean())


def take_turns(*kinds: Layer, depth: int, last: int = 0) -> tuple[Layer, ...]:
  """`depth` layers: the kinds in turn, and `last` plain dense ones to end.

  Args:
    *kinds: one or more, of the first layer, the second, ...
    depth: number of layers.
    last: of them, those at the end that are `Layer()`.

  Raises:
    ValueError: no kind, or more last layers than there are.

  Example:
    >>> local, far = Layer(kconv=1), Layer(kconv=3)
    >>> [x.kconv for x in take_turns(local, far, depth=5, last=1)]
    [1, 3, 1, 3, None]
  """
  if not kinds:
    raise ValueError("no kind of layer is given")
  if not 0 <= last <= depth:
    raise ValueError(f"last is {last}; it lies in [0, depth = {depth}]")
  first = tuple(kinds[i % len(kinds)] for i in range(depth - last))
  return first + (Layer(),) * last


class HybridDecoder(Decoder):
  """A `Decoder` whose layers are told apart by `layers`.

  Parameters are those of a `Decoder` with scan=False, with
  `attn/k_conv/kernel` [w, k, d] where a layer has a `kconv`. Layers all
  `Layer()` are a `Decoder`'s.

  Attributes:
    layers: one each, see `take_turns`.
    scan: False: layers of several kinds are written out.

  Raises:
    ValueError: what such layers can't have, at construction.

  Example:
    >>> import functools
    >>> local = Layer(functools.partial(attention, window=(15, 0)))
    >>> far = Layer(functools.partial(moba, block=8, top_k=2), rope=False)
    >>> model = HybridDecoder(
    ...   vocab_size=64,
    ...   width=32,
    ...   depth=2,
    ...   num_heads=4,
    ...   layers=take_turns(local, far, depth=2),
    ... )
    >>> tokens = jnp.zeros((1, 20), jnp.int32)
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> model.apply(variables, tokens)[0].shape
    (1, 20, 64)
  """

  scan: bool = False
  layers: tuple[Layer, ...] = ()

  def __post_init__(self):
    if len(self.layers) != self.depth:
      raise ValueError(
        f"{len(self.layers)} layers are given for a depth of {self.depth}"
      )
    if self.attend is not attention:
      raise ValueError("attend is set; each of the layers has its own")
    if self.scan:
      raise ValueError("scan is True; layers of several kinds are written out")
    if self.streams == 2:
      raise ValueError("streams is 2; layers of several kinds have one")
    check_chain(self.depth, self.mode)
    super().__post_init__()

  def _stack(self):
    return Chain(
      tuple(self._block(**self._fields(layer)) for layer in self.layers),
      mode=self.mode,
      policy=self.policy,
    )

  def _fields(self, layer):
    return {
      "attend": layer.attend,
      "kconv": layer.kconv,
      "dense_decode": layer.dense_decode,
    }

  def _start(self, cache):
    return cache[0].length

  def _inputs(self, turn, cache):
    own = {"turn": [turn if layer.rope else None for layer in self.layers]}
    if cache is not None:
      own["cache"] = cache
    return own, {}

  def init_cache(
    self, *, batch: int, capacity: int, dtype: Any = None
  ) -> tuple[LayerCache, ...]:
    """An empty cache of each layer; by default in the compute dtype."""
    return tuple(
      self._block(**self._fields(layer)).attn.init_cache(
        batch=batch, capacity=capacity, dtype=dtype
      )
      for layer in self.layers
    )

  def param_count(self) -> int:
    """Number of parameters."""
    _, k, d, _ = self.sizes
    taps = sum(layer.kconv or 0 for layer in self.layers)
    return super().param_count() + taps * k * d

  def flops_per_token(self, seq_len: int) -> float:
    """As `Decoder.flops_per_token`, of the keys that each layer reads.

    `6 P + 12 n d sum_l keys_l`. The comparison of queries with blocks and
    the convolution of keys are not counted.

    Args:
      seq_len: tokens in a row.
    """
    n, _, d, _ = self.sizes
    keys = sum(layer.keys_read(seq_len) for layer in self.layers)
    return 6 * self._matmul_params() + 12 * n * d * keys
