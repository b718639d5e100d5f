"""Packing: every byte of every document is predicted once, and by whom."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.loader import Loader
from isthmus.data.text import Text, TextFiles
from isthmus.data.tokenizer import Bytes


@dataclasses.dataclass(frozen=True)
class Docs:
  """The same documents for both splits."""

  texts: tuple[bytes | str, ...]

  def documents(self, split):
    return ((str(i), text) for i, text in enumerate(self.texts))


DOCS = Docs((b"abcde", b"", "zwölf", bytes(range(256)) * 3, b"q"))
TOTAL = sum(len(t.encode() if type(t) is str else t) for t in DOCS.texts)

texts = st.lists(st.binary(max_size=40), min_size=1, max_size=8).filter(any)


def rows(corpus, split="train", **fields):
  source = Text(corpus, **fields).open(split)
  return source, source.take(np.arange(len(source)))


def predicted(batch):
  """Predicted bytes in order."""
  targets = batch["tokens"][:, 1:]
  return bytes(targets[batch["weights"] > 0].tolist())


def test_a_row_by_hand():
  source, batch = rows(Docs((b"aaaa", b"bb", b"c")), seq_len=5)
  a, b, c, s = *b"abc", 256
  assert batch["tokens"].tolist() == [[s, a, a, a, a, s], [s, b, b, s, c, 0]]
  assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 2],
                                           [1, 1, 1, 2, 2, 0]]  # fmt: skip
  assert batch["weights"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 1, 0]]
  assert batch["num_bytes"].tolist() == [4, 3]
  dtypes = {name: array.dtype for name, array in batch.items()}
  assert dtypes == {"tokens": np.int32, "segment_ids": np.int32,
                    "weights": np.float32, "num_bytes": np.int32}  # fmt: skip
  for name, array in source[1].items():
    assert array.tolist() == batch[name][1].tolist()


@settings(max_examples=80, deadline=None)
@given(texts, st.integers(1, 60))
def test_training_rows_predict_every_byte_once_and_in_order(texts, seq_len):
  _, batch = rows(Docs(tuple(texts)), seq_len=seq_len)
  assert predicted(batch) == b"".join(texts)
  assert batch["num_bytes"].sum() == batch["weights"].sum()
  assert batch["num_bytes"].sum() == sum(map(len, texts))
  # Rows overlap by the one token.
  whole = batch["tokens"]
  np.testing.assert_array_equal(whole[:-1, -1], whole[1:, 0])


@settings(max_examples=80, deadline=None)
@given(texts, st.integers(1, 30), st.data())
def test_windows_predict_every_byte_once_with_context(texts, seq_len, data):
  stride = data.draw(st.integers(1, seq_len))
  _, batch = rows(
    Docs(tuple(texts)), split="eval", seq_len=seq_len, stride=stride
  )
  assert predicted(batch) == b"".join(texts)
  assert batch["num_bytes"].sum() == sum(map(len, texts))
  ids, starts = batch["segment_ids"], batch["tokens"] == 256
  for row, column in np.argwhere(batch["weights"] > 0):
    begun = starts[row, : column + 1].any()
    same = (ids[row, : column + 1] == ids[row, column + 1]).sum()
    assert begun or same >= seq_len - stride


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize(
  "seq_len,stride", [(8, 3), (64, 16), (64, 64), (2000, 7)]
)
def test_a_pass_over_the_eval_split_counts_the_bytes(seq_len, stride, segments):
  text = Text(DOCS, seq_len=seq_len, stride=stride, segments=segments)
  loader = Loader(text.open("eval"), batch_size=7, seed=0, shuffle=False)
  total = weight = 0
  for batch in loader.once():
    total += int((batch["num_bytes"] * batch["valid"]).sum())
    weight += int((batch["weights"] * batch["valid"][:, None]).sum())
  assert total == weight == TOTAL


def test_segments_number_the_documents_of_a_row():
  source, batch = rows(DOCS, seq_len=50)
  ids, tokens = batch["segment_ids"], batch["tokens"]
  assert (ids[:, 0] == 1).all()
  steps = np.diff(ids, axis=1)
  padding = ids[:, 1:] == 0
  np.testing.assert_array_equal(
    steps[~padding] == 1, (tokens[:, 1:] == 256)[~padding]
  )
  assert padding[:-1].sum() == 0 and padding[-1].any()
  crossing, plain = rows(DOCS, seq_len=50, segments=False)
  assert (plain["segment_ids"] == 1).all()
  for name in ("tokens", "weights", "num_bytes"):
    np.testing.assert_array_equal(plain[name], batch[name])


def test_stride_is_of_the_eval_split_only():
  text = Text(DOCS, seq_len=64, stride=16)
  plain = Text(DOCS, seq_len=64)
  assert len(text.open("train")) == len(plain.open("train"))
  assert len(text.open("eval")) > len(plain.open("eval"))


def test_settings_are_checked_without_reading():
  corpus = TextFiles("no/such/folder")
  for fields, match in (
    ({"seq_len": 0}, "seq_len is 0"),
    ({"seq_len": 8, "stride": 9}, "stride is 9.*8"),
    ({"seq_len": 8, "stride": 0}, "stride is 0.*8"),
  ):
    with pytest.raises(ValueError, match=match):
      Text(corpus, **fields)
  assert Text(corpus, seq_len=8).vocab_size == 257


def test_rows_outside_and_empty_splits_are_refused():
  source, _ = rows(DOCS, seq_len=50)
  with pytest.raises(IndexError, match=f"of {len(source)}"):
    source[len(source)]
  with pytest.raises(ValueError, match="0 bytes"):
    Text(Docs((b"", "")), seq_len=8).open("train")


def test_corpora_of_files_split_by_name(tmp_path):
  for i in range(60):
    (tmp_path / f"{i}.txt").write_bytes(b"%d" % i)
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "raw.txt").write_bytes(b"\xff\xfe")
  (tmp_path / "other.md").write_text("no")
  corpus = TextFiles(tmp_path, eval_fraction=0.3)
  train, held = (dict(corpus.documents(s)) for s in ("train", "eval"))
  assert not train.keys() & held.keys()
  assert len(train) + len(held) == 61 and 5 < len(held) < 35
  assert (train | held)["sub/raw.txt"] == b"\xff\xfe"
  (tmp_path / "0.txt").unlink()  # the others stay where they are
  assert dict(corpus.documents("eval")).keys() == held.keys() - {"0.txt"}


def test_corpora_of_files_name_what_is_wrong(tmp_path):
  with pytest.raises(FileNotFoundError, match="no folder.*absent"):
    list(TextFiles(tmp_path / "absent").documents("train"))
  with pytest.raises(FileNotFoundError, match=r"no file matches '\*\*/\*.txt'"):
    list(TextFiles(tmp_path).documents("train"))
  with pytest.raises(ValueError, match="eval_fraction is 1.5"):
    TextFiles(tmp_path, eval_fraction=1.5)
  outside = tmp_path / "outside.txt"
  outside.write_text("secret")
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "link.txt").symlink_to(outside)
  with pytest.raises(ValueError, match="'link.txt' links out"):
    list(TextFiles(tmp_path / "in").documents("train"))


def test_bytes_decode_leaves_out_starts():
  assert Bytes().decode([256, *"zwölf".encode(), 256]) == "zwölf"


def test_text_is_sliced_not_walked():
  """Far below the 10 to 50 M tokens/s measured, far above a Python loop."""
  rng = np.random.default_rng(0)
  corpus = Docs(tuple(rng.bytes(5000) for _ in range(400)))
  source = Text(corpus, seq_len=4096).open("train")
  loader = Loader(source, batch_size=16, seed=0)
  loader.host_batch(0)
  taken = []
  for step in range(5):
    begin = time.perf_counter()
    loader.host_batch(step)
    taken.append(time.perf_counter() - begin)
  assert 16 * 4096 / min(taken) > 2e6
