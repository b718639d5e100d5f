"""A Llama in numpy, from the tensors as a file names and stores them."""

import math

import numpy as np

# What differs between the two formats, beside the order of rotary pairs.
HUGGING_FACE = {
  "embed": "model.embed_tokens.weight",
  "norm": "model.norm.weight",
  "head": "lm_head.weight",
  "norm_attn": "model.layers.{}.input_layernorm.weight",
  "norm_mlp": "model.layers.{}.post_attention_layernorm.weight",
  "q": "model.layers.{}.self_attn.q_proj.weight",
  "k": "model.layers.{}.self_attn.k_proj.weight",
  "v": "model.layers.{}.self_attn.v_proj.weight",
  "o": "model.layers.{}.self_attn.o_proj.weight",
  "gate": "model.layers.{}.mlp.gate_proj.weight",
  "up": "model.layers.{}.mlp.up_proj.weight",
  "down": "model.layers.{}.mlp.down_proj.weight",
}
GGUF = {
  "embed": "token_embd.weight",
  "norm": "output_norm.weight",
  "head": "output.weight",
  "norm_attn": "blk.{}.attn_norm.weight",
  "norm_mlp": "blk.{}.ffn_norm.weight",
  "q": "blk.{}.attn_q.weight",
  "k": "blk.{}.attn_k.weight",
  "v": "blk.{}.attn_v.weight",
  "o": "blk.{}.attn_output.weight",
  "gate": "blk.{}.ffn_gate.weight",
  "up": "blk.{}.ffn_up.weight",
  "down": "blk.{}.ffn_down.weight",
}


def logits(
  tensors,
  tokens,
  *,
  depth,
  heads,
  kv_heads,
  theta,
  eps,
  names=HUGGING_FACE,
  slowed=lambda speed: speed,
  window=None,
):
  """Logits [t, v] of one row of tokens, in the tensors' precision.

  Rotary pairs are half a head apart, or side by side for names=GGUF.
  `slowed` maps each rotary speed to the scaled one.
  """

  def get(name, layer=None):
    return tensors[names[name].format(layer)]

  def norm(x, scale):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale

  x = get("embed")[tokens]
  t = len(tokens)
  d = get("q", 0).shape[0] // heads
  speeds = np.asarray([slowed(theta ** (-2 * i / d)) for i in range(d // 2)])
  turn = np.exp(1j * np.arange(t)[:, None] * speeds)[:, None]  # t 1 d/2

  def rotate(z):
    if names is GGUF:
      z = z[..., 0::2] + 1j * z[..., 1::2]
    else:
      z = z[..., : d // 2] + 1j * z[..., d // 2 :]
    z = z * turn
    return np.concatenate([z.real, z.imag], -1).astype(x.dtype)

  past = np.arange(t)[:, None] - np.arange(t)[None]
  seen = (past >= 0) & (past < (t if window is None else window))
  for i in range(depth):
    h = norm(x, get("norm_attn", i))
    q = rotate((h @ get("q", i).T).reshape(t, heads, d))
    k = rotate((h @ get("k", i).T).reshape(t, kv_heads, d))
    v = (h @ get("v", i).T).reshape(t, kv_heads, d)
    out = []
    for n in range(heads):
      group = n // (heads // kv_heads)
      score = q[:, n] @ k[:, group].T / math.sqrt(d)
      score = np.where(seen, score, -np.inf)
      share = np.exp(score - score.max(-1, keepdims=True))
      out.append(share / share.sum(-1, keepdims=True) @ v[:, group])
    x = x + np.concatenate(out, -1) @ get("o", i).T
    h = norm(x, get("norm_mlp", i))
    gate = h @ get("gate", i).T
    x = (
      x + (gate / (1 + np.exp(-gate)) * (h @ get("up", i).T)) @ get("down", i).T
    )
  head = get("head") if names["head"] in tensors else get("embed")
  return norm(x, get("norm")) @ head.T
