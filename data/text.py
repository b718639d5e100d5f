"""Documents packed into rows of tokens for a language model.

Documents are laid end to end, each preceded by a start token:

  S a a a a S b b S c c c c c …
  [--- row 0 ---]
              [--- row 1 ---]

A row is seq_len + 1 tokens: token i + 1 is the target of token i. Rows share
one token, so that every token but a start is predicted exactly once.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from isthmus.data.cache import Stream, collect, open_cached
from isthmus.data.source import Example, check_split
from isthmus.data.tokenizer import Bytes, Encoder, as_bytes

# Below this many bytes of text a byte stream is not worth a file.
_SMALL = 1 << 28


@runtime_checkable
class Corpus(Protocol):
  """A frozen dataclass that yields named documents, the same ones each time."""

  def documents(self, split: str) -> Iterable[tuple[str, bytes | str]]:
    """(name, text) of each document of a split, "train" or "eval"."""
    ...


@dataclasses.dataclass(frozen=True)
class Text:
  """Rows of tokens from a corpus.

  Args:
    corpus: documents(split) yields (name, text).
    tokenizer: Bytes() or Tokenizer(path).
    seq_len: tokens that a row predicts.
    segments: False numbers a whole row as one segment, so attention crosses
      documents; what is predicted stays the same.
    stride: of the "eval" split, how far windows move; None means seq_len. A
      shorter stride predicts the new tokens of a window only, each with at
      least seq_len - stride tokens of its document before it (or all there
      are). The training split always moves by seq_len.
    cache_dir: where token streams are kept; None means isthmus.data.cache's
      folder. Byte streams below 256 MiB stay in memory.

  Raises:
    ValueError: seq_len < 1, or stride outside [1, seq_len].

  Example:
    >>> _ = pathlib.Path("poem.txt").write_text("to be, or not to be")
    >>> corpus = TextFiles(".", eval_fraction=0.0)
    >>> text = Text(corpus, Bytes(), seq_len=8)
    >>> example = text.open("train")[0]
    >>> example["tokens"].shape, text.tokenizer.decode(example["tokens"])
    ((9,), 'to be, o')
  """

  corpus: Corpus
  tokenizer: Encoder = dataclasses.field(default_factory=Bytes)
  _: dataclasses.KW_ONLY
  seq_len: int
  segments: bool = True
  stride: int | None = None
  cache_dir: str | os.PathLike | None = None

  def __post_init__(self):
    if self.seq_len < 1:
      raise ValueError(f"seq_len is {self.seq_len}; it must be at least 1")
    if self.stride is not None and not 1 <= self.stride <= self.seq_len:
      raise ValueError(
        f"stride is {self.stride}; it must lie in [1, seq_len = {self.seq_len}]"
      )

  @property
  def vocab_size(self) -> int:
    """Of the tokenizer: what the model has to have."""
    return self.tokenizer.vocab_size

  def open(self, split: str) -> "TokenSource":
    """The rows of a split, "train" or "eval"."""
    check_split(split)
    key, size = _fingerprint(self.corpus, self.tokenizer, split)
    if not size:
      raise ValueError(f"split {split!r} of {self.corpus} holds 0 bytes")

    def pieces() -> Iterator[Stream]:
      return _pieces(self.corpus, self.tokenizer, split)

    if isinstance(self.tokenizer, Bytes) and size < _SMALL:
      stream = collect(pieces)
    else:
      stream = open_cached(key, pieces, folder=self.cache_dir)
    stride = self.stride if split == "eval" else None
    return TokenSource(
      stream,
      start=self.tokenizer.start,
      seq_len=self.seq_len,
      stride=self.seq_len if stride is None else stride,
      segments=self.segments,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSource:
  """Windows of a token stream; see Text.

  An example holds

  - `tokens` int32 [seq_len + 1];
  - `segment_ids` int32 [seq_len + 1]: 1, 2, … for the documents in the row, 0
    for padding (all 1 without segments);
  - `weights` float32 [seq_len]: 1 where token i + 1 is to be predicted, which
    leaves out starts, padding and what an earlier window predicted;
  - `num_bytes` int32 []: bytes of text that the weighted targets stand for.

  Example:
    >>> stream = Stream(np.array([256, 104, 105, 256, 111], np.uint16), None)
    >>> source = TokenSource(stream, start=256, seq_len=4, stride=4)
    >>> source[0]["segment_ids"].tolist(), source[0]["weights"].tolist()
    ([1, 1, 1, 2, 2], [1.0, 1.0, 0.0, 1.0])
  """

  stream: Stream
  _: dataclasses.KW_ONLY
  start: int
  seq_len: int
  stride: int
  segments: bool = True

  def __post_init__(self):
    if len(self.stream.tokens) < 2:
      raise ValueError(
        f"the stream holds {len(self.stream.tokens)} tokens; it needs at"
        " least 2"
      )

  def __len__(self) -> int:
    further = len(self.stream.tokens) - 1 - self.seq_len
    return 1 + max(0, -(-further // self.stride))

  def __getitem__(self, i: int) -> Example:
    if not 0 <= i < len(self):
      raise IndexError(f"row {i} of {len(self)}")
    batch = self.take(np.asarray([i]))
    return {name: array[0] for name, array in batch.items()}

  def take(self, indices: Int[np.ndarray, "b"]) -> Example:
    """Rows by number, stacked."""
    indices = np.asarray(indices, np.int64)
    begin, length = indices * self.stride, self.seq_len + 1
    tokens = _windows(self.stream.tokens, begin, length).astype(np.int32)
    real = np.arange(length) < (len(self.stream.tokens) - begin)[:, None]
    starts = tokens == self.start
    weighted = real[:, 1:] & ~starts[:, 1:]
    if self.stride < self.seq_len:
      # All but the first window predict only their last `stride` targets.
      old = np.arange(self.seq_len) < self.seq_len - self.stride
      weighted &= ~(old & (indices > 0)[:, None])
    if self.segments:
      starts[:, 0] = True
      ids = np.cumsum(starts, axis=1, dtype=np.int32) * real
    else:
      ids = np.ones_like(tokens)
    if self.stream.sizes is None:
      num_bytes = weighted.sum(axis=1, dtype=np.int32)
    else:
      sizes = _windows(self.stream.sizes, begin, length)[:, 1:]
      num_bytes = (sizes * weighted).sum(axis=1).astype(np.int32)
    return {
      "tokens": tokens,
      "segment_ids": ids,
      "weights": weighted.astype(np.float32),
      "num_bytes": num_bytes,
    }


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """The files of a folder as a corpus, split by a hash of their names.

  Args:
    folder: where they are; links out of it are refused.
    pattern: which files, as pathlib's glob takes it.
    eval_fraction: share of the files that is held out.

  Raises:
    ValueError: eval_fraction outside [0, 1]; when read, a link that leaves
      the folder.
    FileNotFoundError: when read, no such folder, or no match in it.

  Example:
    >>> _ = pathlib.Path("poem.txt").write_text("to be")
    >>> list(TextFiles(".", eval_fraction=0.0).documents("train"))
    [('poem.txt', b'to be')]
  """

  folder: str | os.PathLike
  pattern: str = "**/*.txt"
  eval_fraction: float = 0.05

  def __post_init__(self):
    check_fraction(self.eval_fraction)

  def documents(self, split: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file of a split."""
    check_split(split)
    root = pathlib.Path(self.folder).expanduser()
    if not root.is_dir():
      raise FileNotFoundError(f"no folder {os.fspath(self.folder)!r}")
    paths = sorted(p for p in root.glob(self.pattern) if p.is_file())
    if not paths:
      raise FileNotFoundError(
        f"no file matches {self.pattern!r} in {os.fspath(self.folder)!r}"
      )
    inside = root.resolve()
    for path in paths:
      name = path.relative_to(root).as_posix()
      if not path.resolve().is_relative_to(inside):
        raise ValueError(f"{name!r} links out of {os.fspath(self.folder)!r}")
      if is_held_out(name, self.eval_fraction) == (split == "eval"):
        yield name, path.read_bytes()


def is_held_out(name: str, fraction: float) -> bool:
  """Whether a name's hash falls into the held-out fraction of all hashes.

  Example:
    >>> sum(is_held_out(f"{i}.txt", 0.1) for i in range(1000))
    90
  """
  digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8)
  return int.from_bytes(digest.digest(), "big") < fraction * 2**64


def check_fraction(fraction: float) -> None:
  """Raises ValueError for what is no share of a whole.

  Example:
    >>> check_fraction(1.5)
    Traceback (most recent call last):
    ValueError: eval_fraction is 1.5; it must lie in [0, 1]
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f"eval_fraction is {fraction}; it must lie in [0, 1]")


def _fingerprint(
  corpus: Corpus, tokenizer: Encoder, split: str
) -> tuple[str, int]:
  """(hash of a split's text and its tokenizer, bytes of its text)."""
  digest, size = hashlib.blake2b(digest_size=20), 0
  digest.update(f"isthmus text 1 {tokenizer.fingerprint()}".encode())
  for _, text in corpus.documents(split):
    text = as_bytes(text)
    digest.update(len(text).to_bytes(8, "big") + text)
    size += len(text)
  return digest.hexdigest(), size


def _pieces(corpus: Corpus, tokenizer: Encoder, split: str) -> Iterator[Stream]:
  """Start token and document, one document after the other."""
  dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
  documents = ((n, text) for n, text in corpus.documents(split) if text)
  for tokens, sizes in tokenizer.encode(documents):
    whole = np.empty(len(tokens) + 1, dtype)
    whole[0], whole[1:] = tokenizer.start, tokens
    if sizes is not None:
      sizes = np.concatenate([np.zeros(1, sizes.dtype), sizes])
    yield Stream(whole, sizes)


def _windows(array: np.ndarray, begin: np.ndarray, length: int) -> np.ndarray:
  """Rows array[b : b + length], zero where the array has ended."""
  # A sliced row is a block copy; an index array would be four times slower.
  rows = np.zeros((len(begin), length), array.dtype)
  for row, first in zip(rows, begin.tolist(), strict=True):
    part = array[first : first + length]
    row[: len(part)] = part
  return rows
