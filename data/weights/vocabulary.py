"""The tokenizer that a GGUF file carries in its metadata."""

import dataclasses
import functools
import json
import os
from typing import Any

from isthmus.data.tokenizer import Tokenizer
from isthmus.data.weights.file import WeightsError, quote
from isthmus.data.weights.gguf import GgufFile

_CONTROL, _USER = 3, 4  # token types that are matched whole
_BYTES = {
  "type": "ByteLevel",
  "add_prefix_space": False,
  "trim_offsets": True,
  "use_regex": True,
}
# tokenizer.ggml.pre -> how text is cut before pairs are merged.
_CUTS = {
  "smollm": {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES],
  },
  "gpt-2": _BYTES,
}


@dataclasses.dataclass(frozen=True)
class GgufTokenizer(Tokenizer):
  """The byte-level pair encoding in a GGUF file.

  Its vocabulary, merges and special tokens are the file's; how text is cut
  into words, which a GGUF file gives by name only, is known for the names
  "smollm" and "gpt-2".

  Args:
    path: the GGUF file, read when it is first used.
    start_token: the special token that starts a document; None adds one after
      the vocabulary.

  Raises:
    ImportError: at first use, where the tokenizers package is missing.
    FileNotFoundError: at first use, where there is no such file.
    WeightsError: at first use, a file without a tokenizer of this kind.

  Example:
    >>> import gguf
    >>> writer = gguf.GGUFWriter("w.gguf", "llama")
    >>> writer.add_tokenizer_model("gpt2")
    >>> writer.add_tokenizer_pre("gpt-2")
    >>> writer.add_token_list(["<s>", "t", "o", "to"])
    >>> writer.add_token_types([3, 1, 1, 1])
    >>> writer.add_token_merges(["t o"])
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.close()
    >>> tokenizer = GgufTokenizer("w.gguf", start_token="<s>")
    >>> tokens, sizes = next(tokenizer.encode([("poem", "tot")]))
    >>> tokens.tolist(), sizes.tolist()
    ([3, 1], [2, 1])
  """

  path: str | os.PathLike
  start_token: str | None = None

  @functools.cached_property
  def _content(self) -> bytes:
    file = GgufFile(self.path)
    return json.dumps(_describe(file), ensure_ascii=False).encode()


def _describe(file: GgufFile) -> dict[str, Any]:
  """What a tokenizer.json of the same tokens holds."""

  def part(name: str, kind: type) -> Any:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, kind):
      raise WeightsError(
        f"{file.path}: tokenizer.ggml.{name} is {quote(value)}, no"
        f" {kind.__name__}"
      )
    return value

  model, cut = part("model", str), part("pre", str)
  if model != "gpt2" or cut not in _CUTS:
    raise WeightsError(
      f"{file.path}: a tokenizer {quote(model)}, {quote(cut)}; 'gpt2' with"
      f" {' or '.join(map(repr, _CUTS))} is read"
    )
  tokens, merges = part("tokens", list), part("merges", list)
  kinds = file.metadata.get("tokenizer.ggml.token_type", [])
  vocabulary = {token: i for i, token in enumerate(tokens)}
  if len(kinds) != len(tokens) or len(vocabulary) != len(tokens):
    raise WeightsError(
      f"{file.path}: {len(tokens)} tokens, {len(vocabulary)} of them distinct,"
      f" with {len(kinds)} types"
    )
  pairs = [merge.split(" ") for merge in merges]
  for pair in pairs:
    if len(pair) != 2 or any(
      p not in vocabulary for p in (*pair, "".join(pair))
    ):
      raise WeightsError(
        f"{file.path}: the merge {quote(' '.join(pair))} is no pair of tokens"
        " that makes a token"
      )
  whole = [
    {
      "id": i,
      "content": token,
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": int(kind) == _CONTROL,
    }
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
    if int(kind) in (_CONTROL, _USER)
  ]
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": whole,
    "normalizer": None,
    "pre_tokenizer": _CUTS[cut],
    "post_processor": None,
    "decoder": _BYTES,
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": False,
      "vocab": vocabulary,
      "merges": pairs,
    },
  }
