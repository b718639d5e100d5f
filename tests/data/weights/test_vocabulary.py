"""A tokenizer rebuilt from GGUF metadata equals the one it came from."""

import json

import numpy as np
import pytest

from isthmus.data.tokenizer import Encoder, Tokenizer
from isthmus.data.weights.file import WeightsError
from isthmus.data.weights.vocabulary import GgufTokenizer
from tests.data.weights import make

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("gguf")

PROSE = ["the cat sat on the mat in 1984, and 12 cats — ünïcode 🙂", "x\n\n  y"]


def trained(cut):
  """A small byte-level BPE with two special tokens, and its JSON."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = cut
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=330,
    special_tokens=["<|end|>", "<|turn|>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(PROSE * 3, trainer)
  return model, json.loads(model.to_str())


def cuts():
  pre = tokenizers.pre_tokenizers
  whole = pre.ByteLevel(add_prefix_space=False)
  digits = pre.Sequence([pre.Digits(individual_digits=True), whole])
  return {"smollm": digits, "gpt-2": whole}


def metadata(content, name):
  vocabulary = content["model"]["vocab"]
  tokens = sorted(vocabulary, key=vocabulary.get)
  return {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": name,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
    "tokenizer.ggml.merges": [" ".join(m) for m in content["model"]["merges"]],
  }


@pytest.mark.parametrize("name", ["smollm", "gpt-2"])
def test_tokens_are_those_of_the_original(tmp_path, name):
  model, content = trained(cuts()[name])
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  path = tmp_path / "w.gguf"
  make.write_gguf(path, {}, metadata(content, name))
  ours = GgufTokenizer(path, start_token="<|end|>")
  want = Tokenizer(tmp_path / "tokenizer.json", start_token="<|end|>")
  assert isinstance(ours, Encoder)
  assert (ours.vocab_size, ours.start) == (want.vocab_size, want.start)
  texts = [*PROSE, "<|turn|>new words 2024<|turn|>", " 7  8"]
  pairs = [(str(i), text) for i, text in enumerate(texts)]
  for (a, bytes_a), (b, bytes_b), text in zip(
    ours.encode(pairs), want.encode(pairs), texts, strict=True
  ):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(bytes_a, bytes_b)
    assert ours.decode(a) == text.replace("<|turn|>", "")
  assert ours.fingerprint() == GgufTokenizer(path, "<|end|>").fingerprint()
  assert ours.fingerprint() != GgufTokenizer(path, "<|turn|>").fingerprint()


def test_digits_are_cut_one_by_one(tmp_path):
  """What sets the two names apart, with the same merges."""
  counts = {}
  _, content = trained(cuts()["gpt-2"])
  for name in cuts():
    path = tmp_path / f"{name}.gguf"
    make.write_gguf(path, {}, metadata(content, name))
    [(tokens, _)] = GgufTokenizer(path).encode([("", " 1984")])
    counts[name] = len(tokens)
  assert counts == {"smollm": 5, "gpt-2": 1}


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model": "llama"}, "a tokenizer 'llama', 'smollm'; 'gpt2' with"),
    ({"pre": "llama-bpe"}, "'llama-bpe'; 'gpt2' with 'smollm' or 'gpt-2'"),
    ({"token_type": [1]}, "tokens, .* of them distinct, with 1 types"),
    ({"tokens": ["a", "a"], "token_type": [1, 1]}, "2 tokens, 1 of them"),
    ({"merges": ["a b c"]}, "the merge 'a b c' is no pair"),
    ({"merges": ["a nowhere"]}, "the merge 'a nowhere' is no pair"),
    ({"merges": 3}, "tokenizer.ggml.merges is 3, no list"),
  ],
)
def test_refused(tmp_path, changes, message):
  _, content = trained(cuts()["smollm"])
  path = tmp_path / "w.gguf"
  fields = metadata(content, "smollm")
  fields |= {f"tokenizer.ggml.{name}": v for name, v in changes.items()}
  make.write_gguf(path, {}, fields)
  with pytest.raises(WeightsError, match=message):
    GgufTokenizer(path).vocab_size  # noqa: B018 (reads the file)


def test_no_tokenizer(tmp_path):
  make.write_gguf(tmp_path / "w.gguf", {})
  with pytest.raises(WeightsError, match="tokenizer.ggml.model is None"):
    GgufTokenizer(tmp_path / "w.gguf").start  # noqa: B018
