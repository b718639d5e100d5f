"""GGUF models: a numpy Llama with pairs side by side, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.data.weights.file import WeightsError
from isthmus.nets.lm.gguf import halve_pairs, load_gguf
from tests.data.weights import make
from tests.nets.lm import folder, oracle

package = pytest.importorskip("gguf")

TOKENS = np.random.default_rng(1).integers(0, 50, 24)
METADATA = {
  "llama.block_count": 2,
  "llama.embedding_length": 32,
  "llama.feed_forward_length": 64,
  "llama.attention.head_count": 4,
  "llama.attention.head_count_kv": 2,
  "llama.attention.layer_norm_rms_epsilon": 1e-5,
  "llama.rope.freq_base": 500.0,
}
CONFIG = folder.CONFIG | {"intermediate_size": 64}


def want(tensors):
  return oracle.logits(
    {n: np.asarray(x, np.float64) for n, x in tensors.items()},
    TOKENS,
    depth=2,
    heads=4,
    kv_heads=2,
    theta=500.0,
    eps=1e-5,
    names=oracle.GGUF,
  )


def written(path, metadata=METADATA, tied=False, **changes):
  tensors = folder.tensors(
    CONFIG | {"tie_word_embeddings": tied}, names=oracle.GGUF
  )
  tensors |= changes
  make.write_gguf(path, tensors, metadata)
  return tensors


@pytest.mark.parametrize("tied, scan", [(True, True), (False, False)])
def test_logits_are_those_of_the_oracle(tmp_path, tied, scan):
  path = tmp_path / "w.gguf"
  tensors = written(path, tied=tied)
  model, params = load_gguf(path, scan=scan)
  assert model.tied == tied and model.vocab_size == 50
  found = model.apply({"params": params}, jnp.asarray(TOKENS[None]))[0][0]
  np.testing.assert_allclose(found, want(tensors), atol=1e-4)
  # The order of rotary pairs matters: half a head apart is another model.
  names = dict(oracle.GGUF)
  other = oracle.logits(
    tensors,
    TOKENS,
    **{"depth": 2, "heads": 4, "kv_heads": 2, "theta": 500.0, "eps": 1e-5},
    names=names,
  )
  assert np.abs(found - other).max() > 0.1


def test_quantised_tensors(tmp_path):
  """The logits are those of the dequantised values."""
  path = tmp_path / "w.gguf"
  kind = package.GGMLQuantizationType.Q8_0
  plain = folder.tensors(CONFIG, names=oracle.GGUF)
  low = {n: (x, kind) if x.ndim == 2 else x for n, x in plain.items()}
  make.write_gguf(path, low, METADATA)
  quants = package.quants
  seen = {
    n: quants.dequantize(quants.quantize(x, kind), kind) if x.ndim == 2 else x
    for n, x in plain.items()
  }
  model, params = load_gguf(path)
  found = model.apply({"params": params}, jnp.asarray(TOKENS[None]))[0][0]
  np.testing.assert_allclose(found, want(seen), atol=1e-4)
  assert np.abs(found - want(plain)).max() > 1e-3


def test_param_dtype(tmp_path):
  written(tmp_path / "w.gguf")
  _, params = load_gguf(tmp_path / "w.gguf", param_dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_halve_pairs_keeps_products():
  """Turning adjacent pairs, or pairs half a head apart, is the same."""
  rows = np.arange(12)[:, None] * np.ones((1, 2))
  order = halve_pairs(rows, heads=2)[:, 0].tolist()
  assert order == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"general.architecture": "qwen2"}, "the architecture 'qwen2'; 'llama'"),
    ({"llama.block_count": 0}, "llama.block_count is 0"),
    ({"llama.block_count": 3}, "lacks the tensor 'blk.2.attn_k.weight' and 8"),
    ({"llama.block_count": 1}, "no place for, .* 'blk.1"),
    ({"llama.block_count": (1 << 32) - 1}, "are no decoder of 4294967295"),
    ({"llama.embedding_length": 64}, "has the shape"),
    ({"llama.attention.head_count": 3}, "num_heads 3 .* num_kv_heads 2"),
    ({"llama.attention.key_length": 4096}, "heads of 4096 for keys, 4096"),
    ({"llama.rope.dimension_count": 4}, "and 4 turned; the decoder has one"),
    ({"llama.rope.scaling.type": "yarn"}, r"are scaled \('yarn'\)"),
    ({"llama.expert_count": 8}, "a mixture of experts"),
    ({"llama.rope.freq_base": "x"}, "llama.rope.freq_base is 'x'"),
  ],
)
def test_metadata_that_are_refused(tmp_path, changes, message):
  metadata = METADATA | changes
  architecture = metadata.pop("general.architecture", "llama")
  if "llama.attention.key_length" in changes:
    metadata["llama.rope.dimension_count"] = 8
  tensors = folder.tensors(CONFIG, names=oracle.GGUF)
  path = tmp_path / "w.gguf"
  make.write_gguf(path, tensors, metadata, architecture)
  with pytest.raises(WeightsError, match=message) as caught:
    load_gguf(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_table_and_a_scaled_one(tmp_path):
  make.write_gguf(tmp_path / "w.gguf", {}, METADATA)
  with pytest.raises(WeightsError, match="lacks the tensor 'token_embd.weight"):
    load_gguf(tmp_path / "w.gguf")
  ones = {"rope_freqs.weight": np.ones(4, np.float32)}
  written(tmp_path / "v.gguf", **ones)
  with pytest.raises(WeightsError, match="positions are scaled"):
    load_gguf(tmp_path / "v.gguf")
