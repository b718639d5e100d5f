"""Small Llama folders with random weights, as publishers lay them out."""

import json

import numpy as np
from safetensors.numpy import save_file

from tests.nets.lm import oracle

CONFIG = {
  "model_type": "llama",
  "vocab_size": 50,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500.0,
  "hidden_act": "silu",
  "tie_word_embeddings": False,
  "bos_token_id": 1,
}


def tensors(config, seed=0, names=oracle.HUGGING_FACE):
  """Random float32 weights, so large that every part of a layer counts."""
  rng = np.random.default_rng(seed)
  width, hidden = config["hidden_size"], config["intermediate_size"]
  heads = config["num_attention_heads"]
  d = config.get("head_dim", width // heads)
  keys = config["num_key_value_heads"] * d
  shapes = {
    "norm_attn": (width,),
    "norm_mlp": (width,),
    "q": (heads * d, width),
    "k": (keys, width),
    "v": (keys, width),
    "o": (width, heads * d),
    "gate": (hidden, width),
    "up": (hidden, width),
    "down": (width, hidden),
  }

  def draw(shape):
    x = rng.standard_normal(shape).astype(np.float32)
    return 1 + 0.3 * x if len(shape) == 1 else 2 * x / np.sqrt(shape[-1])

  table = (config["vocab_size"], width)
  found = {names["embed"]: draw(table), names["norm"]: draw((width,))}
  if not config["tie_word_embeddings"]:
    found[names["head"]] = draw(table)
  for i in range(config["num_hidden_layers"]):
    for name, shape in shapes.items():
      found[names[name].format(i)] = draw(shape)
  return {n: np.asarray(x, np.float32) for n, x in found.items()}


def write(path, config, weights, num_shards=1):
  """config.json and the weights, in one file or in shards with an index."""
  path.mkdir(exist_ok=True)
  (path / "config.json").write_text(json.dumps(config))
  if num_shards == 1:
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path
  placed = {}
  for i in range(num_shards):
    name = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
    part = {n: weights[n] for n in list(weights)[i::num_shards]}
    save_file(part, path / name, {"format": "pt"})
    placed |= dict.fromkeys(part, name)
  index = {"metadata": {}, "weight_map": placed}
  (path / "model.safetensors.index.json").write_text(json.dumps(index))
  return path
