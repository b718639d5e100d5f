"""Memory and time of reversible layers, beside rematerialised ones.

Link: https://arxiv.org/abs/1707.04585
Year: 2017
Family: vision
Core: nets/reversible.py
Reproduced: the gradient of stacks of two streams by parameters and input,
  eight ways that compute the same values: layers walked backwards, with 0 to
  all of their additions cached; each branch, each layer, or all but products
  computed again; everything kept. Perceptrons, attention with perceptrons, 3D
  MBConv, against depth, width and volume. `claims` compiles 3D U-Nets for the
  largest volume, depth and width within a budget.
Simplified: random streams and gradients in place of data, a head and a loss;
  branches compute in bfloat16. MBConv computes its norms again in every mode.
  Budgets count a program's temporaries, not parameters and gradients.
Command: python -m train.main --config reversible_memory
Claim: of a 3D U-Net at a fixed memory, volumes up to 3 times as large, or 25%
  more depth, or twice the channels (arXiv 2104.09648); paper's claim
Result: 0.10 of remat's memory by layer, or 0.44 by branch at 1.02 of its time;
  convolutions 0.36 to 0.61 at 1.01 to 1.12; U-Nets of 11 times the volume
  (H100)
Measured: MiB of compiled temporaries and ms of a gradient, all ways in turns,
  H100 80GB, jax 0.11.2. 48 layers. Perceptrons (width 1024, 16 x 1024 tokens):
  reversible 744, 221; with 0.69 of the additions cached 2872, 207, with 0.77
  3128, 206, with all 3864, 201; remat by branch 7049, 201, by layer 7248, 216,
  of all but products 19169, 188; plain 72512, no room. So 0.10 of the memory of
  remat by layer; 0.44 of that by branch at 1.02 of its time. Transformer (4 x
  4096 tokens): 732, 246; 2824, 239; 3080, 239; 3784, 236; 6792, 237; 6961, 241;
  17507, 223; plain 49344, no room: 0.42 of the memory of remat by branch at
  1.01 of its time. The others in another run, which compiled all 80 programs,
  these 16 to the same memory within 1.1%, and had no time to time them; in the
  same order. 3D MBConv, 4 layers, width 32, 64^3 voxels: 653, 45.2; 978, 44.6;
  978, 44.6; 1010, 44.4; 1070, 41.4; 1070, 41.7; 1742, 43.4; 2989, 43.0. 16
  layers: 653, 180; 1230, 177; 1262, 177; 1390, 176; 1838, 164; 1840, 166; 4430,
  172; 9905, 171. Width 64: 1005, 78.4; 1916, 78.8; 1916, 78.8; 1980, 78.2;
  2108, 77.6; 2109, 78.0; 3358, 79.3; 6175, 74.9. 96^3 voxels: 2189, 144; 3270,
  140; 3270, 140; 3378, 141; 3593, 129; 3594, 130; 5754, 136; 10400, 135.
  Perceptrons, 12 layers: 744, 52.1; 1272, 49.7; 1336, 49.2; 1560, 48.2; 2441,
  48.5; 2640, 52.7; 5345, 45.7; 18825, 64.3. Width 2048: 1568, 180; 2592, 170;
  2720, 169; 3104, 166; 4897, 162; 5280, 177; 10689, 147; 38433, 181. 32 x 1024
  tokens: 1440, 103; 2576, 99.3; 2704, 97.5; 3024, 96.8; 4873, 95.1; 5264, 104;
  10689, 88.9; 37257, 125. Transformer, 12 layers: 732, 60.2; 1224, 58.6; 1288,
  58.5; 1480, 57.8; 2184, 57.8; 2353, 58.7; 4835, 54.5; 12714, 64.8.
  U-Nets within 70 GiB (`claims`, 4 channels, 128^3 voxels unless enlarged),
  reversible against plain: a cube of 288 against 128, 11.4 times the voxels; at
  least 16 layers against 5; at least 240 first channels against 72; 240 x 240 x
  160 voxels take 25 GiB against 216. In all four the reversible net ran a step.
  So volume (3 times), depth (25%) and channels (twice) are replicated, and
  exceeded, by a net that isn't the paper's; measured by us
Check: none
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from isthmus.attention.module import Attention
from isthmus.nets.coupling import Branch, Pair, enter, snap
from isthmus.nets.mbconv import MBConv
from isthmus.nets.mlp import Mlp
from isthmus.nets.norm import RMSNorm
from isthmus.nets.reversible import reversible_stack
from isthmus.nets.vision.unet3d import UNet3D
from isthmus.train.config import choose
from isthmus.train.ladder import Ladder
from isthmus.train.limits import Limits

# In the order of what they keep: a device's peak is told where it rises.
WAYS: dict[str, dict[str, Any]] = {
  "reversible": {"mode": "reversible"},
  "cache-0.69": {"mode": "reversible", "cache": 0.69},
  "cache-0.77": {"mode": "reversible", "cache": 0.77},
  "cache-1": {"mode": "reversible", "cache": 1.0},
  "remat-sublayer": {"mode": "remat"},
  "remat-block": {"mode": "block"},
  "remat-dots": {
    "mode": "remat",
    "policy": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  },
  "plain": {"mode": "plain"},
}
BASES = ("remat-sublayer", "remat-block")


def get_config(variant: str = "full") -> Ladder | Limits:
  """`full`, `claims`: a GPU of 80 GB, 7 and 9 minutes; `smoke`: seconds, a CPU.

  Both begin nothing new after that; `claims`, run again, goes on.
  `small` is `claims` with a smaller net and budget: minutes on a CPU.
  """
  return choose(
    {"full": _full, "claims": _claims, "small": _small, "smoke": _smoke},
    variant,
  )


def _full() -> Ladder:
  tokens, attended, cube = (16, 1024), (4, 4096), (1, 64, 64, 64)
  problems = (
    Stack("conv", 4, 32, cube),
    Stack("conv", 16, 32, cube),
    Stack("conv", 4, 64, cube),
    Stack("conv", 4, 32, (1, 96, 96, 96)),
    Stack("mlp", 12, 1024, tokens),
    Stack("mlp", 12, 2048, tokens),
    Stack("mlp", 12, 1024, (32, 1024)),
    Stack("transformer", 12, 1024, attended),
    Stack("mlp", 48, 1024, tokens),
    Stack("transformer", 48, 1024, attended),
  )
  return Ladder(problems=problems, ways=tuple(WAYS), bases=BASES)


def _claims() -> Limits:
  return Limits(
    net=UNet3D(classes=3, depth=4, dtype=jnp.bfloat16),
    budget=70.0,
    sides=(128, 128, 128),
    channels=4,
    most=(320, 16, 240),
    # BraTS's 155 planes, padded so that they halve four times.
    shown=(240, 240, 160),
    modes=("reversible", "plain"),
    limit_s=540.0,
  )


def _small() -> Limits:
  return Limits(
    # These blocks compile sooner than MBConv.
    net=UNet3D(classes=3, widths=(8, 16), depth=4, block="conv"),
    budget=1 / 32,
    sides=(32, 32, 32),
    most=(96, 32, 32),
    modes=("reversible", "plain"),
    limit_s=900.0,
  )


def _smoke() -> Ladder:
  problems = (
    Stack("mlp", 2, 16, (2, 8)),
    Stack("mlp", 4, 16, (2, 8)),
  )
  ways = ("reversible", *BASES)
  return Ladder(
    problems=problems, ways=ways, bases=BASES, rounds=1, seconds=1e-3
  )


# --- the stacks ---


class Normed(nn.Module):
  """`inner(norm(x))`; of (y, aux), y."""

  inner: nn.Module

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    y = self.inner(RMSNorm(name="norm")(x))
    return y[0] if isinstance(y, tuple) else y


@dataclasses.dataclass(frozen=True)
class Stack:
  """A stack and its input, two streams [*volume, width].

  Attributes:
    stack: "mlp" (4 times as wide inside), "transformer" (heads of 128) or
      "conv" (MBConv).
    depth: layers, of two branches each.
    width: channels of a stream.
    volume: rows, then tokens or voxels along each axis.
  """

  stack: str
  depth: int
  width: int
  volume: tuple[int, ...]

  def __post_init__(self):
    if self.stack not in ("mlp", "transformer", "conv"):
      raise ValueError(
        f"stack {self.stack!r} is none of mlp, transformer, conv"
      )
    if min(self.depth, self.width, *self.volume) < 1:
      raise ValueError(f"{self}: sizes are at least 1")
    axes = 4 if self.stack == "conv" else 2
    if len(self.volume) != axes:
      raise ValueError(
        f"{self.stack}'s volume {self.volume} has {len(self.volume)} axes; it"
        f" has {axes}"
      )
    if self.stack == "transformer" and self.width % self.head:
      raise ValueError(f"width {self.width} is no multiple of {self.head}")

  @property
  def sizes(self) -> dict[str, Any]:
    """As a row has them."""
    return dataclasses.asdict(self)

  @property
  def head(self) -> int:
    """Channels of a head of attention."""
    return min(128, self.width)

  def modules(self) -> tuple[nn.Module, nn.Module]:
    """f and g."""
    if self.stack == "conv":
      block = MBConv(dtype=jnp.bfloat16)
      return block, block
    scale = (2 * self.depth) ** -0.5
    kinds: dict[str, Any] = {
      "out_scale": scale,
      "dtype": jnp.bfloat16,
      "parent": None,
    }
    mlp = Normed(Mlp(4 * self.width, **kinds))
    if self.stack == "mlp":
      return mlp, mlp
    heads = self.width // self.head
    return Normed(Attention(heads, heads, self.head, **kinds)), mlp

  def draw(self, key: PRNGKeyArray) -> tuple[Any, Pair, Pair]:
    """(parameters, streams, gradients of what comes out), all random."""
    keys = jax.random.split(key, 6)
    small = jnp.zeros((1, *(2,) * (len(self.volume) - 1), self.width))
    params = tuple(
      jax.vmap(lambda key, m=module: m.init(key, small)["params"])(
        jax.random.split(k, self.depth)
      )
      for module, k in zip(self.modules(), keys[:2], strict=True)
    )
    x1, x2, d1, d2 = (
      jax.random.normal(k, (*self.volume, self.width)) for k in keys[2:]
    )
    return params, (x1, x2), (d1, d2)

  def gradient(self, way: str) -> Callable[[Any, Pair, Pair], Any]:
    """`(params, x, dy) -> (d params, d x)`, one of `WAYS`."""
    options = dict(WAYS[way])
    f, g = (_branch(module) for module in self.modules())
    forward: Callable[..., Any] = run_blocks
    if options["mode"] != "block":
      forward = functools.partial(_run, **options)

    def call(params, x, dy):
      y, back = jax.vjp(lambda p, x: forward(f, g, p, x), params, x)
      del y
      return back(dy)

    return call


def _branch(module: nn.Module) -> Branch:
  def call(params, x, /, *, key, state, aux):
    return module.apply({"params": params}, x), state

  return call


def _run(f: Branch, g: Branch, params: Any, x: Pair, **options: Any) -> Pair:
  return reversible_stack(f, g, params, x, **options)[0]


def run_blocks(
  f: Branch, g: Branch, params: Any, x: Pair, *, grid: int = 12
) -> Pair:
  """`reversible_stack`'s values; only what goes into a layer is kept.

  Its mode "remat" keeps what goes into each branch.
  """

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def layer(x, params):
    x1, x2 = x
    dx, _ = f(params[0], x2, key=None, state=None, aux=None)
    y1 = x1 + snap(dx, x1, grid)
    dx, _ = g(params[1], y1, key=None, state=None, aux=None)
    return y1, x2 + snap(dx, x2, grid)

  step = lambda x, params: (layer(x, params), None)
  return jax.lax.scan(step, enter(x, grid), params)[0]
