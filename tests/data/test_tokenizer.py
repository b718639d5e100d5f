"""Subword tokens, and the bytes that each of them stands for."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.text import Text
from isthmus.data.tokenizer import Bytes, Tokenizer, _token_bytes

tokenizers = pytest.importorskip("tokenizers")


@dataclasses.dataclass(frozen=True)
class Docs:
  texts: tuple[str | bytes, ...]

  def documents(self, split):
    return ((str(i), text) for i, text in enumerate(self.texts))


SAMPLE = ["the cat sat on the mat — the end", "def f(x):\n  return x + x\n"] * 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """A small byte-level BPE with one special token."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=["<end>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(SAMPLE, trainer)
  model.enable_truncation(5)
  place = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  model.save(str(place))
  return place


def open_rows(corpus, tokenizer, folder, seq_len=16, **fields):
  source = Text(
    corpus, tokenizer, seq_len=seq_len, cache_dir=folder, **fields
  ).open("eval")
  return source, source.take(np.arange(len(source)))


@pytest.mark.parametrize("start_token", [None, "<end>"])
def test_documents_come_back_and_bytes_add_up(path, tmp_path, start_token):
  texts = (*SAMPLE[:2], "naïve 🙂🙂 ünïcode", "  leading and trailing  ")
  tokenizer = Tokenizer(path, start_token)
  _, batch = open_rows(Docs(texts), tokenizer, tmp_path)
  assert batch["num_bytes"].sum() == sum(len(t.encode()) for t in texts)
  targets = batch["tokens"][:, 1:][batch["weights"] > 0]
  assert tokenizer.decode(targets) == "".join(texts)
  assert len(targets) < sum(len(t.encode()) for t in texts)  # it does merge
  assert batch["tokens"].max() < tokenizer.vocab_size
  assert batch["tokens"][0, 0] == tokenizer.start
  expected = len(tokenizers.Tokenizer.from_file(str(path)).get_vocab())
  assert tokenizer.vocab_size == expected + (start_token is None)


@settings(max_examples=30, deadline=None)
@given(
  st.lists(st.text(max_size=30), min_size=1, max_size=4).filter(any),
  st.integers(2, 20),
  st.data(),
)
def test_bytes_add_up_for_any_text(path, tmp_path_factory, texts, n, data):
  stride = data.draw(st.integers(1, n))
  _, batch = open_rows(
    Docs(tuple(texts)),
    Tokenizer(path),
    tmp_path_factory.getbasetemp() / "any",
    seq_len=n,
    stride=stride,
  )
  assert batch["num_bytes"].sum() == sum(len(t.encode()) for t in texts)


def test_bytes_of_a_token_are_those_of_its_text(path):
  text = "the cat — 🙂"
  ((tokens, sizes),) = Tokenizer(path).encode([("d", text)])
  pieces = Tokenizer(path)._model.encode(text, add_special_tokens=False)
  assert sizes.sum() == len(text.encode())
  for (begin, end), size in zip(pieces.offsets[:3], sizes[:3], strict=True):
    assert size == len(text[begin:end].encode())
  assert len(tokens) > 5  # the file's truncation to 5 is off


def test_bytes_that_a_tokenizer_drops_are_counted(tmp_path):
  words = tokenizers.models.WordLevel({"the": 0, "?": 1}, unk_token="?")
  model = tokenizers.Tokenizer(words)
  model.normalizer = tokenizers.normalizers.Lowercase()
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model.save(str(tmp_path / "words.json"))
  texts = ("   THE  Straße \n", "the", "  ", "–the")
  tokenizer = Tokenizer(tmp_path / "words.json")
  ((tokens, sizes),) = tokenizer.encode([("0", texts[0])])
  assert tokens.tolist() == [0, 1]
  assert sizes.tolist() == [8, 9]  # "   THE  " and "Straße \n"
  _, batch = open_rows(Docs(texts), tokenizer, tmp_path)
  # The document of two spaces gives no token that could stand for them.
  assert batch["num_bytes"].sum() == 8 + 9 + 3 + 6


def test_bytes_of_tokens_out_of_order_stay_whole():
  sizes = _token_bytes("aéb d", [(1, 2), (0, 1), (1, 2), (4, 5)])
  assert sizes.tolist() == [1, 0, 4, 1]


def test_start_token_in_a_document_is_refused(path, tmp_path):
  corpus = Docs(("fine", "has <end> inside"))
  with pytest.raises(ValueError, match="'1' contains '<end>'"):
    open_rows(corpus, Tokenizer(path, "<end>"), tmp_path)
  open_rows(corpus, Tokenizer(path), tmp_path)


def test_errors_name_the_remedy(path, tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match="no tokenizer file.*absent"):
    Tokenizer(tmp_path / "absent.json").vocab_size  # noqa: B018
  broken = tmp_path / "broken.json"
  broken.write_text(json.dumps({"a": 1}))
  with pytest.raises(ValueError, match="broken.json.*not a tokenizers JSON"):
    Tokenizer(broken).vocab_size  # noqa: B018
  with pytest.raises(ValueError, match="no token '<bos>'"):
    Tokenizer(path, "<bos>").start  # noqa: B018
  with pytest.raises(ValueError, match="'0' is not UTF-8 at byte 1"):
    open_rows(Docs((b"a\xff",)), Tokenizer(path), tmp_path)
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ImportError, match=r"pip install 'isthmus\[data\]'"):
    Tokenizer(path).vocab_size  # noqa: B018


def test_fingerprint_follows_the_content_not_the_path(path, tmp_path):
  copy = tmp_path / "copy.json"
  copy.write_bytes(path.read_bytes())
  same = Tokenizer(copy).fingerprint()
  assert same == Tokenizer(path).fingerprint()
  assert same != Tokenizer(path, "<end>").fingerprint() != Bytes().fingerprint()
