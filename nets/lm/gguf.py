"""Llama-style models in GGUF files, as llama.cpp converts them."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from isthmus.attention.sdpa import attention
from isthmus.data.weights.file import WeightsError, quote
from isthmus.data.weights.gguf import GgufFile
from isthmus.nets.lm.assembly import assemble
from isthmus.nets.transformer import Decoder

_NAMES = {
  "embed/embedding": "token_embd.weight",
  "norm/scale": "output_norm.weight",
  "head/kernel": "output.weight",
  "stack/blocks/norm_attn/scale": "blk.{}.attn_norm.weight",
  "stack/blocks/norm_mlp/scale": "blk.{}.ffn_norm.weight",
  "stack/blocks/attn/q/kernel": "blk.{}.attn_q.weight",
  "stack/blocks/attn/k/kernel": "blk.{}.attn_k.weight",
  "stack/blocks/attn/v/kernel": "blk.{}.attn_v.weight",
  "stack/blocks/attn/o/kernel": "blk.{}.attn_output.weight",
  "stack/blocks/mlp/gate/kernel": "blk.{}.ffn_gate.weight",
  "stack/blocks/mlp/up/kernel": "blk.{}.ffn_up.weight",
  "stack/blocks/mlp/down/kernel": "blk.{}.ffn_down.weight",
}


def load_gguf(
  path: str | os.PathLike,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  scan: bool = True,
  mode: str = "plain",
  attend: Callable[..., Any] = attention,
) -> tuple[Decoder, dict[str, Any]]:
  """A model of the architecture "llama" as a `Decoder` and its parameters.

  Quantised tensors are dequantised. Queries and keys, which GGUF stores with
  each rotary pair side by side, get the decoder's order back.

  Args:
    path: the GGUF file.
    dtype: what is multiplied.
    param_dtype: what is stored.
    scan, mode: see `Stack`.
    attend: the attention mechanism.

  Returns:
    (model, params), the parameters on the default device.

  Raises:
    FileNotFoundError: no such file.
    ImportError: quantised tensors, where the package gguf is missing.
    WeightsError: a damaged file; another architecture or scaling of
      positions; a tensor that is missing, one too many, or of another shape.

  Example:
    >>> import gguf
    >>> writer = gguf.GGUFWriter("w.gguf", "mamba")
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.close()
    >>> model, params = load_gguf("w.gguf")
    Traceback (most recent call last):
    isthmus.data.weights.file.WeightsError: w.gguf: ...'mamba'; 'llama' is read
  """
  file = GgufFile(path)
  tied = _NAMES["head/kernel"] not in file.tensors
  model = _decoder(
    file,
    tied=tied,
    dtype=dtype,
    param_dtype=param_dtype,
    scan=scan,
    mode=mode,
    attend=attend,
  )
  n, k, _, _ = model.sizes
  convert = {
    "stack/blocks/attn/q/kernel": functools.partial(halve_pairs, heads=n),
    "stack/blocks/attn/k/kernel": functools.partial(halve_pairs, heads=k),
  }
  return model, assemble(model, file, _NAMES, convert=convert)


def halve_pairs(
  matrix: Shaped[np.ndarray, "r m"], *, heads: int
) -> Shaped[np.ndarray, "r m"]:
  """Rows of each head in the order 0, 2, 4, ..., 1, 3, 5, ...

  Then rotary pairs, which lay side by side, are half a head apart.

  Args:
    matrix: [heads d, inputs].
    heads: number of heads.

  Returns:
    The same rows in the new order.

  Example:
    >>> halve_pairs(np.arange(4)[:, None], heads=1).tolist()
    [[0], [2], [1], [3]]
  """
  pairs = matrix.reshape(heads, -1, 2, matrix.shape[-1])
  return pairs.swapaxes(1, 2).reshape(matrix.shape)


def _decoder(file: GgufFile, **fields: Any) -> Decoder:
  """The decoder that the metadata describe."""

  def fail(reason: str) -> WeightsError:
    return WeightsError(f"{file.path}: {reason}")

  def value(name: str, kind: type, default: Any = None) -> Any:
    found = file.metadata.get(f"llama.{name}", default)
    if type(found) is not kind or found <= 0:
      raise fail(f"llama.{name} is {quote(found)}; it is above 0")
    return found

  kind = file.metadata.get("general.architecture")
  if kind != "llama":
    raise fail(f"the architecture {quote(kind)}; 'llama' is read")
  scaling = file.metadata.get("llama.rope.scaling.type", "none")
  if scaling != "none" or "rope_freqs.weight" in file.tensors:
    raise fail(f"rotary positions are scaled ({quote(scaling)}); none is read")
  if file.metadata.get("llama.expert_count", 0):
    raise fail("a mixture of experts, which the decoder doesn't have")
  width = value("embedding_length", int)
  heads = value("attention.head_count", int)
  head_dim = value("attention.key_length", int, width // heads)
  turned = value("rope.dimension_count", int, head_dim)
  other = value("attention.value_length", int, head_dim)
  if turned != head_dim or other != head_dim:
    raise fail(
      f"heads of {head_dim} for keys, {other} for values and {turned} turned;"
      " the decoder has one width"
    )
  if "token_embd.weight" not in file.tensors:
    raise fail("lacks the tensor 'token_embd.weight'")
  try:
    return Decoder(
      # The table's rows: not all files say llama.vocab_size.
      vocab_size=file.tensors["token_embd.weight"].shape[0],
      width=width,
      depth=value("block_count", int),
      num_heads=heads,
      num_kv_heads=value("attention.head_count_kv", int, heads),
      head_dim=head_dim,
      hidden=value("feed_forward_length", int),
      rope_theta=value("rope.freq_base", float, 1e4),
      eps=value("attention.layer_norm_rms_epsilon", float),
      **fields,
    )
  except WeightsError:
    raise
  except ValueError as error:  # sizes that don't fit each other
    raise fail(str(error)) from error
