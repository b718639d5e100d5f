"""Llama-style models: a folder of config.json and safetensors.

Llama 1 to 3, Mistral and SmolLM, or whatever else says `"model_type":
"llama"` or `"mistral"`. What the decoder can't do is refused by name.

Reference: https://arxiv.org/abs/2302.13971 (Llama), 2310.06825 (Mistral)
"""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from isthmus.attention.sdpa import attention
from isthmus.data.tokenizer import Tokenizer
from isthmus.data.weights.file import Weights, WeightsError, inside, quote
from isthmus.data.weights.safetensors import SafetensorsFolder, read_json
from isthmus.nets.lm.assembly import assemble
from isthmus.nets.rotary import LinearScaling, Llama3Scaling, RopeScaling
from isthmus.nets.transformer import Decoder

_BLOCK = "model.layers.{}."
_NAMES = {
  "embed/embedding": "model.embed_tokens.weight",
  "norm/scale": "model.norm.weight",
  "head/kernel": "lm_head.weight",
  "stack/blocks/norm_attn/scale": _BLOCK + "input_layernorm.weight",
  "stack/blocks/norm_mlp/scale": _BLOCK + "post_attention_layernorm.weight",
  **{
    f"stack/blocks/attn/{n}/kernel": f"{_BLOCK}self_attn.{n}_proj.weight"
    for n in "qkvo"
  },
  **{
    f"stack/blocks/mlp/{n}/kernel": f"{_BLOCK}mlp.{n}_proj.weight"
    for n in ("gate", "up", "down")
  },
}
# Settings that change the computation in a way the decoder doesn't have, with
# the values that don't; a setting that is missing has the first.
_FIXED: dict[str, tuple[Any, ...]] = {
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "attention_dropout": (0.0,),
  "hidden_act": ("silu", "swish"),
  "partial_rotary_factor": (1.0, None),
  "qk_norm": (False, None),
  "use_qk_norm": (False, None),
  "qk_layernorm": (False, None),
  "quantization_config": (None,),
}
_MOST_TOKENIZER_BYTES = 1 << 26


def load_llama(
  folder: str | os.PathLike,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  scan: bool = True,
  mode: str = "plain",
  attend: Callable[..., Any] = attention,
  follow_links: bool = False,
) -> tuple[Decoder, dict[str, Any]]:
  """A published model as a `Decoder` and its parameters.

  The folder holds `config.json` and `model.safetensors`, or shards of it with
  `model.safetensors.index.json`. A sliding window becomes `attend`'s
  `window`; the cache of `generate` still keeps all keys.

  Args:
    folder: the folder.
    dtype: what is multiplied.
    param_dtype: what is stored; the file's values are cast to it.
    scan, mode: see `Stack`.
    attend: the attention mechanism.
    follow_links: let files be links that lead out of the folder, as in the
      cache of a model hub.

  Returns:
    (model, params), the parameters on the default device.

  Raises:
    FileNotFoundError: a file is missing.
    WeightsError: a damaged file; a setting that the decoder can't do; a
      tensor that is missing, one too many, or of another shape.

  Example:
    >>> import json, safetensors.numpy
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
    >>> depth = {"num_hidden_layers": 1, "num_attention_heads": 2}
    >>> config = {"model_type": "llama", "tie_word_embeddings": True}
    >>> text = json.dumps(config | sizes | depth)
    >>> _ = pathlib.Path("config.json").write_text(text)
    >>> shapes = {"model.embed_tokens": (9, 8), "model.norm": (8,)}
    >>> for name in ("input_layernorm", "post_attention_layernorm"):
    ...   shapes["model.layers.0." + name] = (8,)
    >>> for name in ("q", "k", "v", "o"):
    ...   shapes[f"model.layers.0.self_attn.{name}_proj"] = (8, 8)
    >>> for name in ("gate", "up", "down"):
    ...   shapes[f"model.layers.0.mlp.{name}_proj"] = (8, 8)
    >>> safetensors.numpy.save_file(
    ...   {n + ".weight": np.ones(s, np.float16) for n, s in shapes.items()},
    ...   "model.safetensors",
    ... )
    >>> model, params = load_llama(".")
    >>> params["stack"]["blocks"]["mlp"]["up"]["kernel"].shape
    (1, 8, 8)
  """
  folder = pathlib.Path(folder)
  path = inside(folder, "config.json", follow_links=follow_links)
  model = decoder(
    read_json(path),
    path,
    dtype=dtype,
    param_dtype=param_dtype,
    scan=scan,
    mode=mode,
    attend=attend,
  )
  weights = SafetensorsFolder(folder, follow_links=follow_links)
  skip = _angles(model, weights)
  if model.tied and _NAMES["head/kernel"] in weights.tensors:
    skip.append(_same_head(weights))
  return model, assemble(model, weights, _NAMES, skip=skip)


def decoder(
  config: dict[str, Any],
  path: str | os.PathLike = "config.json",
  *,
  attend: Callable[..., Any] = attention,
  **kinds: Any,
) -> Decoder:
  """The decoder that a config.json describes, without parameters.

  Args:
    config: its content.
    path: named in errors.
    attend: the attention mechanism.
    **kinds: dtype, param_dtype, scan and mode of the decoder.

  Raises:
    WeightsError: a setting that is missing, or that the decoder can't do.

  Example:
    >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 99}
    >>> depth = {"num_hidden_layers": 2, "num_attention_heads": 4}
    >>> decoder({"model_type": "llama"} | sizes | depth).param_count()
    94912
  """

  def fail(reason: str) -> WeightsError:
    return WeightsError(f"{os.fspath(path)}: {reason}")

  def size(name: str, default: Any = None) -> Any:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or value < 1:
      raise fail(f"{name} is {quote(value)}; it is a whole number above 0")
    return value

  def positive(name: str, default: float, values: dict[str, Any]) -> float:
    value = values.get(name, default)
    if type(value) not in (int, float) or not 0 < value < np.inf:
      raise fail(f"{name} is {quote(value)}; it is a number above 0")
    return float(value)

  kind = config.get("model_type")
  if kind not in ("llama", "mistral"):
    raise fail(f"model_type {quote(kind)}; 'llama' and 'mistral' are read")
  for name, allowed in _FIXED.items():
    value = config.get(name, allowed[0])
    if value not in allowed:
      raise fail(
        f"{name} is {quote(value)}, which the decoder doesn't have; it does"
        f" {allowed[0]!r}"
      )
  tied = config.get("tie_word_embeddings", False)
  if type(tied) is not bool:
    raise fail(f"tie_word_embeddings is {quote(tied)}; it is true or false")
  window = config.get("sliding_window")
  layers = set(config.get("layer_types") or ())
  if layers - {"full_attention" if window is None else "sliding_attention"}:
    raise fail(
      f"layer_types {quote(sorted(map(str, layers)))} with sliding_window"
      f" {quote(window)}; layers of one kind are read"
    )
  if window is not None:
    if kind == "llama":
      raise fail(f"sliding_window is {quote(window)}, which 'llama' lacks")
    # The query itself counts to the window.
    attend = functools.partial(attend, window=(size("sliding_window") - 1, 0))
  heads = size("num_attention_heads")
  turns = _turns(config, fail)
  try:
    return Decoder(
      vocab_size=size("vocab_size"),
      width=size("hidden_size"),
      depth=size("num_hidden_layers"),
      num_heads=heads,
      num_kv_heads=size(
        "num_key_value_heads", heads if kind == "llama" else None
      ),
      head_dim=size("head_dim", size("hidden_size") // heads),
      hidden=size("intermediate_size"),
      rope_theta=positive("rope_theta", 1e4, turns),
      rope_scaling=_scaling(turns, fail),
      tied=tied,
      eps=positive("rms_norm_eps", 1e-6, config),
      attend=attend,
      **kinds,
    )
  except WeightsError:
    raise
  except ValueError as error:  # sizes that don't fit each other
    raise fail(str(error)) from error


def load_tokenizer(
  folder: str | os.PathLike, *, follow_links: bool = False
) -> Tokenizer:
  """The tokenizer of a model's folder.

  Documents start with the token that `bos_token_id` of config.json names.

  Args:
    folder: holds config.json and tokenizer.json.
    follow_links: let files be links that lead out of the folder.

  Raises:
    FileNotFoundError: a file is missing.
    ImportError: the tokenizers package is missing.
    WeightsError: no such token, or more tokens than the model has.

  Example:
    >>> import json, tokenizers
    >>> words = tokenizers.models.WordLevel({"to": 0, "be": 1}, unk_token="to")
    >>> whole = tokenizers.Tokenizer(words)
    >>> whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> _ = whole.add_special_tokens(["<s>"])
    >>> whole.save("tokenizer.json")
    >>> config = json.dumps({"bos_token_id": 2, "vocab_size": 3})
    >>> _ = pathlib.Path("config.json").write_text(config)
    >>> tokenizer = load_tokenizer(".")
    >>> tokenizer.start, next(tokenizer.encode([("poem", "to be")]))[0].tolist()
    (2, [0, 1])
  """
  folder = pathlib.Path(folder)
  path = inside(folder, "config.json", follow_links=follow_links)
  config = read_json(path)
  place = inside(folder, "tokenizer.json", follow_links=follow_links)
  content = read_json(place, most=_MOST_TOKENIZER_BYTES)
  number, added = config.get("bos_token_id"), content.get("added_tokens")
  found = [
    token.get("content")
    for token in (added if isinstance(added, list) else [])
    if isinstance(token, dict) and token.get("id") == number
  ]
  if type(number) is not int or len(found) != 1 or type(found[0]) is not str:
    raise WeightsError(
      f"{path}: bos_token_id is {quote(number)}, which is not one of the"
      f" added_tokens of {place.name}"
    )
  tokenizer = Tokenizer(place, start_token=found[0])
  rows = config.get("vocab_size")
  if type(rows) is not int or tokenizer.vocab_size > rows:
    raise WeightsError(
      f"{place}: {tokenizer.vocab_size} tokens; config.json has a vocab_size"
      f" of {quote(rows)}"
    )
  return tokenizer


def _turns(config: dict[str, Any], fail: Callable[..., Any]) -> dict[str, Any]:
  """rope_theta, and the scaling's fields, from either place they may be in."""
  scaling = config.get("rope_scaling") or {}
  turns = config.get("rope_parameters") or {}
  for name, value in (("rope_scaling", scaling), ("rope_parameters", turns)):
    if not isinstance(value, dict):
      raise fail(f"{name} is {quote(value)}, no object")
  if turns and scaling:
    raise fail("rope_scaling and rope_parameters are both given; keep one")
  theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
  return theta | scaling | turns


def _scaling(
  turns: dict[str, Any], fail: Callable[..., Any]
) -> RopeScaling | None:
  kind = turns.get("rope_type", turns.get("type", "default"))
  fields = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
      "factor",
      "low_freq_factor",
      "high_freq_factor",
      "original_max_position_embeddings",
    ),
  }
  if kind not in fields:
    raise fail(
      f"the rope scaling {quote(kind)}, which the decoder doesn't have; it"
      " does 'default', 'linear' and 'llama3'"
    )
  values: list[Any] = [turns.get(name) for name in fields[kind]]
  for name, value in zip(fields[kind], values, strict=True):
    if type(value) not in (int, float):
      raise fail(f"{name} of the rope scaling {kind!r} is {quote(value)}")
  if kind == "default":
    return None
  return LinearScaling(*values) if kind == "linear" else Llama3Scaling(*values)


def _angles(model: Decoder, weights: Weights) -> list[str]:
  """Names of tables of angles, which old files carry, once they agree."""
  names = [n for n in weights.names if n.endswith(".rotary_emb.inv_freq")]
  _, _, width, _ = model.sizes
  for name in names:
    shape = weights.tensors[name].shape
    found = weights.read(name)
    # The file's shape first: the configuration's may be any number.
    if shape != (width // 2,) or not np.allclose(
      found, model.rope_theta ** (-np.arange(0, width, 2) / width), rtol=0.01
    ):
      raise WeightsError(
        f"{weights.path}: {name!r} of shape {shape} has other angles than"
        f" rope_theta {model.rope_theta} gives for {(width // 2,)}"
      )
  return names


def _same_head(weights: Weights) -> str:
  """The name of a tied model's head, once it equals the table of tokens."""
  name, table = _NAMES["head/kernel"], _NAMES["embed/embedding"]
  if table not in weights.tensors or not np.array_equal(
    weights.read(name), weights.read(table)
  ):
    raise WeightsError(
      f"{weights.path}: tie_word_embeddings is true, but {name!r} differs from"
      f" {table!r}"
    )
  return name
