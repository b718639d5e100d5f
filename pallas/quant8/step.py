"""A step of Adam over moments in eight bits, by the best implementation."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float

from isthmus.pallas.dispatch import Impl, Op
from isthmus.pallas.quant8 import ref
from isthmus.pallas.quant8.api import QTensor
from isthmus.pallas.quant8.ref import Rates


def _refuse_mosaic(*args: Any, **kwargs: Any) -> str | None:
  from isthmus.pallas.quant8 import mosaic

  return mosaic.refuse(*args, **kwargs)


def _refuse_tpu(*args: Any, **kwargs: Any) -> str | None:
  from isthmus.pallas.quant8 import tpu

  return tpu.refuse(*args, **kwargs)


#: The step's implementations: kernels read and write each number once.
ADAM = Op(
  "adam over eight bits",
  (
    Impl("mosaic", "isthmus.pallas.quant8.mosaic:adam", _refuse_mosaic),
    Impl("tpu", "isthmus.pallas.quant8.tpu:adam", _refuse_tpu),
    Impl("xla", ref.adam),
  ),
  {"gpu": ("mosaic", "xla"), "tpu": ("tpu", "xla")},
)


def adam(
  g: Float[Array, "..."],
  m: QTensor,
  v: QTensor,
  rates: Rates,
  p: Float[Array, "..."] | None = None,
  *,
  impl: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "..."], QTensor, QTensor]:
  """One step of Adam: moments are read, renewed, used and written back.

  `g <- clip g`, `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g^2`,
  `u = scale1 m / (scale2 sqrt(v) + eps)`, all in float32; u is of the moments
  before they are rounded. Given parameters, the step is also taken, which saves
  writing and reading u: `p <- p - learning_rate (u + weight_decay p)`.

  Args:
    g: gradients.
    m, v: the moments, of the shape of g, cut alike.
    rates: of this step, see `isthmus.pallas.quant8.ref.rates`.
    p: parameters, or None.
    impl: implementations to take, see `isthmus.pallas.dispatch`.

  Returns:
    u in float32, or the new p in its dtype; the new m; the new v.

  Raises:
    ValueError: shapes or blocks that differ.

  Example:
    >>> import jax.numpy as jnp
    >>> from isthmus.pallas.quant8.api import zeros
    >>> from isthmus.pallas.quant8.maps import ROOT
    >>> m, v = zeros((2,)), zeros((2,), map=ROOT)
    >>> one = ref.rates(1, learning_rate=0.1)
    >>> p, m, v = adam(jnp.array([1.0, -1.0]), m, v, one, jnp.ones(2))
    >>> [f"{x:.2f}" for x in p.tolist()]
    ['0.90', '1.10']
  """
  for name, x in (("m", m), ("v", v), ("p", p)):
    if x is not None and x.shape != g.shape:
      raise ValueError(f"{name} is {x.shape}, and the gradient {g.shape}")
  if m.blocks != v.blocks:
    raise ValueError(f"m is cut into {m.blocks}, and v into {v.blocks}")
  return ADAM(g, m, v, rates, p, impl=impl)


def in_place(
  g: Float[Array, "..."],
  m: QTensor,
  v: QTensor,
  p: Float[Array, "..."] | None = None,
  *,
  impl: str | Sequence[str] | None = None,
) -> bool:
  """Whether `adam` of these writes where it reads, with no array besides.

  Args:
    g, m, v, p, impl: of `adam`; ShapeDtypeStructs serve as arrays.

  Example:
    >>> import jax.numpy as jnp
    >>> from isthmus.pallas.quant8.api import zeros
    >>> in_place(jnp.ones((16, 512)), zeros((16, 512)), zeros((16, 512)))
    False
  """
  for row in ADAM.explain(g, m, v, None, p, impl=impl):
    if row.verdict == "runs":
      return row.name != "xla"
  return False
