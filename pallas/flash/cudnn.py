"""cuDNN's attention: dense bfloat16 and float16 on NVIDIA GPUs, without lse."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from isthmus.pallas.dispatch import platform
from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.predicate import Band
from isthmus.pallas.flash.ref import OUT

#: Its forward kernel carries no names; a policy knows it by its primitive.
FORWARD = "dot_product_attention_fwd"


def attend(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k d"],
  extras: Extras,
  *,
  options: Options,
) -> tuple[Float[Array, "b t n d"], None]:
  """(o, None): what `refuse` takes, by cuDNN.

  Raises:
    NotImplementedError: cuDNN refuses while it is traced.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 4, 64), jnp.float32)
    >>> refuse(x, x, x, Extras(), options=Options())  # on a CPU
    'it needs an NVIDIA GPU, and the platform is cpu'
  """
  del extras  # refused unless empty
  band = options.predicate
  # A band that is not refused ends at the query itself.
  left = band.left if isinstance(band, Band) else None
  try:
    o = jax.nn.dot_product_attention(
      q,
      k,
      v,
      scale=options.scale,
      is_causal=band is not None,
      local_window_size=None if left is None else (left, 0),
      implementation="cudnn",
    )
  except RuntimeError as error:
    if type(error) is not RuntimeError:  # not a refusal: a failure on device
      raise
    raise NotImplementedError(f"cudnn: {error}") from error
  return checkpoint_name(o, OUT), None


def refuse(
  q: Any, k: Any, v: Any, extras: Extras, *, options: Options
) -> str | None:
  """Why cuDNN can't take a call on this machine, or None.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 4, 64), jnp.bfloat16)
    >>> refuse(x, x, x, Extras(), options=Options())  # on a CPU
    'it needs an NVIDIA GPU, and the platform is cpu'
  """
  if platform() != "gpu":
    return f"it needs an NVIDIA GPU, and the platform is {platform()}"
  capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
  if not capability.replace(".", "").isdigit():
    return f"it needs an NVIDIA GPU, and this is {jax.local_devices()[0]}"
  if float(capability) < 8:
    return f"it needs compute capability 8.0, and the GPU has {capability}"
  hopper = float(capability) >= 9
  return refuse_call(q, k, v, extras, options=options, hopper=hopper)


def refuse_call(
  q: Any, k: Any, v: Any, extras: Extras, *, options: Options, hopper: bool
) -> str | None:
  """What cuDNN can't take on any GPU, by shapes and settings alone.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 4, 64), jnp.float32)
    >>> refuse_call(x, x, x, Extras(), options=Options(), hopper=True)
    'it takes bfloat16 and float16, not float32'
  """
  (t, d), (s, dv), limit = q.shape[1::2], v.shape[1::2], 256 if hopper else 128
  if extras.lists is not None:
    return "it does not take lists of blocks"
  if extras.sinks is not None:
    return "it does not take sinks"
  band = options.predicate
  if band is not None and not isinstance(band, Band):
    return f"it takes causal masks and their windows, not {band}"
  if options.dropout_rate:
    return f"it does not take dropout ({options.dropout_rate})"
  if options.softcap is not None:
    return f"it does not take softcap ({options.softcap})"
  if options.return_lse:
    return "its lse can't be differentiated"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it takes bfloat16 and float16, not {q.dtype}"
  if band is not None and band.right != 0:
    return f"it takes a window {(band.left, band.right)} with causal only"
  if band is not None and (band.offset or t != s):
    return (
      f"its causal mask is aligned top-left, and {t} queries meet {s} keys at "
      f"an offset of {band.offset}"
    )
  if t % 2 or s % 2:
    return f"its backward pass takes even lengths, not {t} queries and {s} keys"
  if d != dv:
    return f"it takes values as wide as keys, not {dv} and {d}"
  if d % 8 or d > limit:
    return f"it takes head widths of 8, 16, ..., {limit}, not {d}"
  return None
