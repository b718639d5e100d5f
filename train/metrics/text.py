"""What simple models make of a text: compressors, and a Kneser-Ney n-gram."""

import gzip
import lzma
from collections.abc import Sequence

import numpy as np

_BITS = 9  # a byte or the start symbol
_START = 256


def gzip_bits(documents: Sequence[bytes]) -> float:
  """Bits a byte of `gzip -9` on the documents joined into one stream.

  Example:
    >>> gzip_bits([b"to be, or not to be"] * 100) < 1
    True
  """
  text = b"".join(documents)
  return 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)


def xz_bits(documents: Sequence[bytes]) -> float:
  """Bits a byte of `xz -9` on the documents joined into one stream.

  Example:
    >>> xz_bits([b"to be, or not to be"] * 100) < 1
    True
  """
  text = b"".join(documents)
  return 8 * len(lzma.compress(text, preset=9)) / len(text)


def ngram_bits(
  train: Sequence[bytes],
  held_out: Sequence[bytes],
  *,
  order: int = 5,
  discount: float = 0.75,
) -> float:
  r"""Bits a byte of an interpolated Kneser-Ney n-gram model of bytes.

  With `c` the count of (context, byte), or below the highest order the number
  of distinct symbols seen before it, and `T` the distinct bytes after a
  context `h` (whose shorter context is h'):

    p(x|h) = (max(c(h,x) - d, 0) + d T(h) p(x|h')) / sum_x c(h,x)

  Args:
    train: documents to count.
    held_out: documents to predict; each starts after a start symbol.
    order: symbols of an n-gram, its context being order - 1 of them.
    discount: d, between 0 and 1.

  Returns:
    Mean of -log2 p over the bytes of `held_out`.

  Example:
    >>> f"{ngram_bits([b'abracadabra'], [b'abra'], order=2):.2f}"
    '0.86'

  Reference: Kneser and Ney, "Improved backing-off for m-gram language
    modeling", 1995; interpolated form of Chen and Goodman, 1999.
  """
  if not 1 <= order <= 64 // _BITS:
    raise ValueError(f"order is {order}; it is between 1 and {64 // _BITS}")
  grams = np.unique(_grams(train, order), return_counts=True)
  wanted = _grams(held_out, order)
  levels = []
  for n in range(order, 0, -1):
    mask = np.uint64((1 << (_BITS * n)) - 1)
    levels.append((*grams, wanted & mask))
    # Continuation counts: each distinct n-gram counts once for its suffix.
    shorter = grams[0] & np.uint64((1 << (_BITS * (n - 1))) - 1)
    grams = np.unique(shorter, return_counts=True)
  p = np.full(len(wanted), 1 / 256)
  for keys, counts, targets in reversed(levels):
    contexts, first = np.unique(keys >> np.uint64(_BITS), return_index=True)
    totals = np.add.reduceat(counts, first)
    kinds = np.diff(np.append(first, len(keys)))
    count = _look_up(keys, counts, targets)
    total = _look_up(contexts, totals, targets >> np.uint64(_BITS))
    kind = _look_up(contexts, kinds, targets >> np.uint64(_BITS))
    seen = total > 0
    share = (np.maximum(count - discount, 0) + discount * kind * p) / np.where(
      seen, total, 1
    )
    p = np.where(seen, share, p)
  return float(-np.log2(p).mean())


def _grams(documents: Sequence[bytes], order: int) -> np.ndarray:
  """The n-gram that ends at each byte, as an integer, oldest symbol first."""
  out = []
  for document in documents:
    symbols = np.full(len(document) + order - 1, _START, np.uint64)
    symbols[order - 1 :] = np.frombuffer(document, np.uint8)
    key = np.zeros(len(document), np.uint64)
    for i in range(order):
      key = key << np.uint64(_BITS) | symbols[i : i + len(document)]
    out.append(key)
  return np.concatenate(out)


def _look_up(keys, values, wanted) -> np.ndarray:
  """values[keys == wanted], 0 where there is none; `keys` ascend."""
  at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[at] == wanted, values[at], 0)
