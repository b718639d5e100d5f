"""Llama folders: logits of a numpy Llama, and what is refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from isthmus.data.weights.file import WeightsError
from isthmus.nets.lm.llama import decoder, load_llama, load_tokenizer
from isthmus.nets.rotary import LinearScaling, Llama3Scaling
from isthmus.nets.sample.decode import generate
from isthmus.nets.transformer import Decoder
from tests.nets.lm import folder, oracle

TOKENS = np.random.default_rng(1).integers(0, 50, 24)
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}


def llama3(speed):
  wave, long = 2 * math.pi / speed, 64
  if wave < long / 4.0:
    return speed
  if wave > long / 1.0:
    return speed / 8.0
  smooth = (long / wave - 1.0) / (4.0 - 1.0)
  return (1 - smooth) * speed / 8.0 + smooth * speed


def want(config, weights, **settings):
  """The oracle's logits, in float64."""
  return oracle.logits(
    {n: x.astype(np.float64) for n, x in weights.items()},
    TOKENS,
    depth=config["num_hidden_layers"],
    heads=config["num_attention_heads"],
    kv_heads=config["num_key_value_heads"],
    theta=config.get("rope_theta", 1e4),
    eps=config["rms_norm_eps"],
    **settings,
  )


def ours(model, params):
  return model.apply({"params": params}, jnp.asarray(TOKENS[None]))[0][0]


CASES = {
  "grouped, untied, two shards": ({}, 2, {}, {}),
  "one head each, tied, layers written out": (
    {"num_key_value_heads": 4, "tie_word_embeddings": True},
    1,
    {},
    {"scan": False},
  ),
  "one key head of another width": (
    {"num_key_value_heads": 1, "head_dim": 12},
    3,
    {},
    {},
  ),
  "linear scaling": (
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    1,
    {"slowed": lambda speed: speed / 4.0},
    {},
  ),
  "llama3 scaling": ({"rope_scaling": LLAMA3}, 1, {"slowed": llama3}, {}),
  "sliding window": (
    {"model_type": "mistral", "sliding_window": 5},
    1,
    {"window": 5},
    {},
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_oracle(tmp_path, case):
  changes, num_shards, settings, kinds = CASES[case]
  config = folder.CONFIG | changes
  weights = folder.tensors(config)
  path = folder.write(tmp_path / "m", config, weights, num_shards)
  model, params = load_llama(path, **kinds)
  assert isinstance(model, Decoder)
  count = sum(x.size for x in jax.tree.leaves(params))
  assert model.param_count() == count == sum(x.size for x in weights.values())
  found, expected = ours(model, params), want(config, weights, **settings)
  assert np.abs(expected).max() > 5
  np.testing.assert_allclose(found, expected, atol=1e-4)
  if settings:  # and the setting matters
    assert np.abs(found - want(config, weights)).max() > 0.1


def test_a_window_holds_with_a_cache(tmp_path):
  config = folder.CONFIG | CASES["sliding window"][0]
  weights = folder.tensors(config)
  model, params = load_llama(folder.write(tmp_path / "m", config, weights))
  drawn = generate(
    model,
    params,
    jnp.asarray(TOKENS[None, :12]),
    length=12,
    key=jax.random.key(0),
    temperature=0.0,
  )
  row = [*TOKENS[:12], *np.asarray(drawn)[0]]
  whole = model.apply({"params": params}, jnp.asarray([row]))[0][0]
  assert row[12:] == np.argmax(whole, -1)[11:-1].tolist()


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_dtypes(tmp_path, stored):
  config = folder.CONFIG
  low = {
    n: x.astype(jnp.dtype(stored)) for n, x in folder.tensors(config).items()
  }
  path = folder.write(tmp_path / "m", config, low)
  model, params = load_llama(path)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  np.testing.assert_allclose(
    ours(model, params), want(config, low), atol=1e-4
  )  # widening is exact
  model, params = load_llama(path, dtype=jnp.bfloat16, param_dtype=stored)
  assert model.dtype == jnp.bfloat16
  assert all(x.dtype == stored for x in jax.tree.leaves(params))
  low = load_file(path / "model.safetensors")
  np.testing.assert_array_equal(
    params["head"]["kernel"], low["lm_head.weight"].T
  )
  np.testing.assert_array_equal(
    params["stack"]["blocks"]["attn"]["k"]["kernel"][1],
    low["model.layers.1.self_attn.k_proj.weight"].T,
  )


SIZES = {k: v for k, v in folder.CONFIG.items() if k != "bos_token_id"}


def test_fields_of_the_decoder():
  model = decoder(SIZES)
  fields = dataclasses.asdict(model)
  expected = {
    "vocab_size": 50,
    "width": 32,
    "depth": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden": 48,
    "rope_theta": 500.0,
    "eps": 1e-5,
    "tied": False,
    "rope_scaling": None,
  }
  assert {n: fields[n] for n in expected} == expected
  linear = {"rope_type": "linear", "factor": 2}
  assert decoder(SIZES | {"rope_scaling": linear}).rope_scaling == (
    LinearScaling(2)
  )
  # Newer folders have one place for all of it.
  theta = {"rope_theta": 7e5}
  newer = {n: v for n, v in SIZES.items() if n != "rope_theta"}
  model = decoder(newer | {"rope_parameters": LLAMA3 | theta})
  assert model.rope_theta == 7e5
  assert model.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)
  assert decoder(newer).rope_theta == 1e4
  assert decoder(SIZES | {"rope_scaling": None}).rope_scaling is None
  without = {n: v for n, v in SIZES.items() if n != "num_key_value_heads"}
  assert decoder(without).sizes[1] == 4


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model_type": "gemma"}, "model_type 'gemma'; 'llama' and 'mistral'"),
    ({"model_type": None}, "model_type None"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_key_value_heads": 3}, "num_heads 4 .* num_kv_heads 3"),
    ({"head_dim": 7}, "head_dim is 7"),
    ({"attention_bias": True}, "attention_bias is True, which the decoder"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', .* it does 'silu'"),
    ({"qk_norm": True}, "qk_norm is True"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits'"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ({"rope_theta": -1}, "rope_theta is -1"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
    ({"sliding_window": 4}, "sliding_window is 4, which 'llama' lacks"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    (
      {"layer_types": ["full_attention", "sliding_attention"]},
      "layer_types .* with sliding_window None",
    ),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope scaling 'yarn'"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "rope scaling 'dynamic'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor of the .* is None"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
    ({"rope_scaling": 3}, "rope_scaling is 3, no object"),
    (
      {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3},
      "are both given; keep one",
    ),
  ],
)
def test_settings_that_are_refused(changes, message):
  with pytest.raises(WeightsError, match=message) as caught:
    decoder(SIZES | changes, "m/config.json")
  assert str(caught.value).startswith("m/config.json: ")
  assert "\n" not in str(caught.value)


LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda w: w.pop(LAST), f"lacks the tensor '{LAST}'"),
    (
      lambda w: w.pop("lm_head.weight"),
      "lacks the tensor 'lm_head.weight'",
    ),
    (
      lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": w[LAST][0]}),
      "no place for, the tensor 'model.layers.0.self_attn.q_proj.bias'",
    ),
    (
      lambda w: w.update({"model.layers.2.mlp.down_proj.weight": w[LAST]}),
      "no place for, the tensor 'model.layers.2.mlp.down_proj.weight'",
    ),
    (
      lambda w: w.update({LAST: np.ascontiguousarray(w[LAST].T)}),
      rf"'{LAST}' has the shape \(48, 32\), not \(32, 48\)",
    ),
    (
      lambda w: w.update({LAST: w[LAST].astype(np.int32)}),
      f"'{LAST}' is int32, not floats",
    ),
  ],
)
def test_tensors_are_all_accounted_for(tmp_path, change, message):
  weights = folder.tensors(folder.CONFIG)
  change(weights)
  path = folder.write(tmp_path / "m", folder.CONFIG, weights)
  with pytest.raises(WeightsError, match=message) as caught:
    load_llama(path)
  assert str(path) in str(caught.value)


def test_sizes_that_no_file_could_mean(tmp_path):
  """Refused before anything of that size is made."""
  weights = folder.tensors(folder.CONFIG)
  for name in ("num_hidden_layers", "head_dim", "vocab_size"):
    config = folder.CONFIG | {name: 1 << 40}
    path = folder.write(tmp_path / "m", config, weights)
    with pytest.raises(WeightsError, match="are no decoder of"):
      load_llama(path)


def test_heads_and_angles_that_files_may_repeat(tmp_path):
  config = folder.CONFIG | {"tie_word_embeddings": True}
  weights = folder.tensors(config)
  plain = load_llama(folder.write(tmp_path / "a", config, weights))
  table = weights["model.embed_tokens.weight"]
  angles = 500.0 ** (-np.arange(0, 8, 2, dtype=np.float32) / 8)
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  more = weights | {"lm_head.weight": table.copy(), name: angles}
  again = load_llama(folder.write(tmp_path / "b", config, more))
  assert jax.tree.all(jax.tree.map(jnp.array_equal, plain[1], again[1]))
  other = more | {"lm_head.weight": table + 1}
  with pytest.raises(WeightsError, match="'lm_head.weight' differs from"):
    load_llama(folder.write(tmp_path / "b", config, other))
  other = more | {name: angles[::-1].copy()}
  with pytest.raises(WeightsError, match="has other angles than rope_theta"):
    load_llama(folder.write(tmp_path / "b", config, other))


def test_missing_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="config.json"):
    load_llama(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(folder.CONFIG))
  with pytest.raises(FileNotFoundError, match="neither model.safetensors"):
    load_llama(tmp_path)
  with pytest.raises(FileNotFoundError, match="tokenizer.json"):
    load_tokenizer(tmp_path)


def test_links_are_followed_if_asked(tmp_path):
  config = folder.CONFIG
  folder.write(tmp_path / "blobs", config, folder.tensors(config))
  (tmp_path / "m").mkdir()
  for name in ("config.json", "model.safetensors"):
    (tmp_path / "m" / name).symlink_to(f"../blobs/{name}")
  with pytest.raises(WeightsError, match="follow_links=True"):
    load_llama(tmp_path / "m")
  model, _ = load_llama(tmp_path / "m", follow_links=True)
  assert model.width == 32


def test_tokenizer(tmp_path):
  tokenizers = pytest.importorskip("tokenizers")
  words = {"<s>": 1, "a": 0, "b": 2, "<unk>": 3}
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token="<unk>")
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(["<s>"])
  made.save(str(tmp_path / "tokenizer.json"))

  def config(**changes):
    text = json.dumps(folder.CONFIG | changes)
    (tmp_path / "config.json").write_text(text)
    return load_tokenizer(tmp_path)

  found = config()
  assert (found.start, found.vocab_size) == (1, 4)
  [(tokens, _)] = found.encode([("", "b a b")])
  assert tokens.tolist() == [2, 0, 2]
  for number in (0, None, [1]):
    with pytest.raises(WeightsError, match="not one of the added_tokens"):
      config(bos_token_id=number)
  with pytest.raises(WeightsError, match="4 tokens; .* vocab_size of 3"):
    config(vocab_size=3)


# ---- against transformers; pytest -m parity

PARITY = {
  "heads": {"num_key_value_heads": 4},
  "grouped": {},
  "tied": {"tie_word_embeddings": True},
  "width": {"head_dim": 12},
  "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
  "llama3": {"rope_scaling": LLAMA3},
  "mistral": {"model_type": "mistral", "sliding_window": 5},
  "mistral, whole": {"model_type": "mistral", "sliding_window": None},
}


@pytest.mark.parity
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("case", PARITY)
def test_transformers(tmp_path, case, shard_size, record_property):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  fields = SIZES | {"attn_implementation": "eager"} | PARITY[case]
  kind = fields.pop("model_type").title()
  config = getattr(transformers, f"{kind}Config")(**fields)
  torch.manual_seed(0)
  theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
  with torch.no_grad():  # as large as weights that have been trained
    for name, weight in theirs.named_parameters():
      weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
  theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
  sharded = (tmp_path / "model.safetensors.index.json").exists()
  assert sharded == (shard_size == "20KB")
  model, params = load_llama(tmp_path)
  with torch.no_grad():
    expected = theirs(torch.as_tensor(TOKENS[None])).logits[0].numpy()
  difference = np.abs(np.asarray(ours(model, params)) - expected).max()
  record_property("difference", float(difference))
  record_property("largest", float(np.abs(expected).max()))
  print(f"{case}: {difference:.2e} of {np.abs(expected).max():.1f}")
  assert np.abs(expected).max() > 1
  assert difference <= 1e-3
