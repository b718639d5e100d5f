"""From a document to token numbers, and the bytes that each stands for."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

#: (tokens, bytes of each token, None where every token is one byte)
Encoded = tuple[np.ndarray, np.ndarray | None]


@runtime_checkable
class Encoder(Protocol):
  """What Text asks of a tokenizer."""

  @property
  def vocab_size(self) -> int:
    """Highest token number plus one."""
    ...

  @property
  def start(self) -> int:
    """The token that precedes every document, and occurs nowhere else."""
    ...

  def fingerprint(self) -> str:
    """Differs wherever another token would come out of some text."""
    ...

  def encode(
    self, documents: Iterable[tuple[str, bytes | str]]
  ) -> Iterator[Encoded]:
    """(tokens, bytes that each stands for) of each (name, text)."""
    ...

  def decode(self, tokens: Any) -> str:
    """The text of tokens, start tokens left out."""
    ...


@dataclasses.dataclass(frozen=True)
class Bytes:
  """A token per byte, and token 256 to start a document.

  Example:
    >>> tokens, sizes = next(Bytes().encode([("poem", "to be")]))
    >>> tokens.tolist(), Bytes().decode(tokens)
    ([116, 111, 32, 98, 101], 'to be')
  """

  @property
  def vocab_size(self) -> int:
    """257: the bytes, and the start token."""
    return 257

  @property
  def start(self) -> int:
    """The token before each document."""
    return 256

  def fingerprint(self) -> str:
    """What a cached stream is known by."""
    return "bytes"

  def encode(
    self, documents: Iterable[tuple[str, bytes | str]]
  ) -> Iterator[Encoded]:
    """(tokens, None) of each document, a byte a token."""
    for _, text in documents:
      yield np.frombuffer(as_bytes(text), np.uint8).astype(np.uint16), None

  def decode(self, tokens: Any) -> str:
    """Text of the byte tokens; start tokens are left out."""
    kept = [t for t in np.asarray(tokens).ravel().tolist() if 0 <= t < 256]
    return bytes(kept).decode("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Any `tokenizers` JSON file, read when it is first used.

  Args:
    path: a tokenizer.json.
    start_token: the special token that starts a document, e.g.
      "<|endoftext|>"; None adds one after the vocabulary.

  Raises:
    ImportError: at first use, where the tokenizers package is missing.
    FileNotFoundError: at first use, where there is no such file.
    ValueError: at first use, where the vocabulary lacks start_token.

  Example:
    >>> import tokenizers
    >>> words = {"to": 0, "be": 1, "<s>": 2}
    >>> model = tokenizers.models.WordLevel(words, unk_token="<s>")
    >>> whole = tokenizers.Tokenizer(model)
    >>> whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> whole.save("tokenizer.json")
    >>> tokenizer = Tokenizer("tokenizer.json", start_token="<s>")
    >>> tokens, sizes = next(tokenizer.encode([("poem", "to be")]))
    >>> tokens.tolist(), sizes.tolist()
    ([0, 1], [3, 2])
  """

  path: str | os.PathLike
  start_token: str | None = None

  @functools.cached_property
  def _content(self) -> bytes:
    if not os.path.isfile(self.path):
      raise FileNotFoundError(f"no tokenizer file {os.fspath(self.path)!r}")
    return pathlib.Path(self.path).read_bytes()

  @functools.cached_property
  def _model(self) -> Any:
    try:
      import tokenizers
    except ImportError as error:
      raise ImportError(
        "Tokenizer needs the package tokenizers: pip install 'isthmus[data]'"
      ) from error
    content = self._content
    try:
      model = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the package raises bare exceptions
      raise ValueError(
        f"{os.fspath(self.path)!r} is not a tokenizers JSON file: {error}"
      ) from error
    # A file may ask for cut or padded encodings; a corpus needs all of it.
    model.no_truncation()
    model.no_padding()
    return model

  @property
  def vocab_size(self) -> int:
    """Highest token number plus one, the start token included."""
    size = self._size
    return size + 1 if self.start_token is None else size

  @functools.cached_property
  def _size(self) -> int:
    # Token numbers may have gaps, so the highest one counts.
    return max(self._model.get_vocab(with_added_tokens=True).values()) + 1

  @functools.cached_property
  def start(self) -> int:
    """The token before each document."""
    if self.start_token is None:
      return self._size
    token = self._model.token_to_id(self.start_token)
    if token is None:
      raise ValueError(
        f"{os.fspath(self.path)!r} has no token {self.start_token!r} among its"
        f" {self._size}; start_token=None adds one"
      )
    return token

  def fingerprint(self) -> str:
    """What a cached stream is known by: a hash of the file."""
    digest = hashlib.blake2b(self._content).hexdigest()
    return f"tokenizers {digest} {self.start_token}"

  def encode(
    self, documents: Iterable[tuple[str, bytes | str]]
  ) -> Iterator[Encoded]:
    """(tokens, bytes that each stands for) of each document."""
    for name, text in documents:
      if isinstance(text, bytes):
        try:
          text = text.decode("utf-8")
        except UnicodeDecodeError as error:
          raise ValueError(
            f"document {name!r} is not UTF-8 at byte {error.start}; re-encode"
            " it or use Bytes()"
          ) from error
      encoding = self._model.encode(text, add_special_tokens=False)
      tokens = np.asarray(encoding.ids, np.uint32)
      if (tokens == self.start).any():
        raise ValueError(
          f"document {name!r} contains {self.start_token!r}, the token that"
          " starts a document; remove it or choose another start_token"
        )
      if len(tokens):
        yield tokens, _token_bytes(text, encoding.offsets)

  def decode(self, tokens: Any) -> str:
    """Text of the tokens; start tokens are left out."""
    kept = np.asarray(tokens).ravel()
    return self._model.decode(kept[kept != self.start].tolist())


def as_bytes(text: bytes | str) -> bytes:
  """UTF-8 bytes of a document.

  Example:
    >>> len(as_bytes("naïve"))
    6
  """
  return text.encode("utf-8") if isinstance(text, str) else bytes(text)


def _token_bytes(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
  """Bytes of the text from each token's begin to the next one's.

  What lies before the first token counts to it, so the sum over a document
  is its size whatever a normaliser drops.
  """
  widths = np.asarray([len(c.encode("utf-8")) for c in text], np.int64)
  before = np.concatenate([[0], np.cumsum(widths)])
  begins = np.asarray([begin for begin, _ in offsets], np.int64)
  begins = np.maximum.accumulate(before[begins])
  begins[0] = 0
  return np.diff(begins, append=before[-1]).astype(np.uint32)
