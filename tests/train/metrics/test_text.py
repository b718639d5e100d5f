"""Text baselines: the n-gram against a plain dictionary version."""

import collections
import math
import random

import numpy as np
import pytest

from isthmus.train.metrics import text


def _plain_ngram(train, held_out, order, d):
  """Interpolated Kneser-Ney, written as the definition reads."""
  counts = [collections.Counter() for _ in range(order + 1)]
  for document in train:
    symbols = [256] * (order - 1) + list(document)
    for i in range(order - 1, len(symbols)):
      counts[order][tuple(symbols[i - order + 1 : i + 1])] += 1
  for n in range(order - 1, 0, -1):
    for gram in counts[n + 1]:
      counts[n][gram[1:]] += 1
  rows = [collections.defaultdict(dict) for _ in range(order + 1)]
  for n in range(1, order + 1):
    for gram, c in counts[n].items():
      rows[n][gram[:-1]][gram[-1]] = c

  def probability(gram):
    if not gram:
      return 1 / 256
    row = rows[len(gram)].get(gram[:-1])
    lower = probability(gram[1:])
    if row is None:
      return lower
    total = sum(row.values())
    return (max(row.get(gram[-1], 0) - d, 0) + d * len(row) * lower) / total

  bits, size = 0.0, 0
  for document in held_out:
    symbols = [256] * (order - 1) + list(document)
    for i in range(order - 1, len(symbols)):
      bits -= math.log2(probability(tuple(symbols[i - order + 1 : i + 1])))
      size += 1
  return bits / size


def _documents(seed, count):
  rng = random.Random(seed)
  words = [b"def ", b"return ", b"x", b"yy", b"\n", b"(", b")"]
  return [b"".join(rng.choices(words, k=60)) for _ in range(count)]


@pytest.mark.parametrize("order", [1, 2, 3, 5, 7])
def test_ngram_is_kneser_ney(order):
  train, held_out = _documents(0, 5), _documents(1, 2)
  got = text.ngram_bits(train, held_out, order=order, discount=0.6)
  assert got == pytest.approx(
    _plain_ngram(train, held_out, order, 0.6), rel=1e-9
  )


def test_ngram_is_a_distribution():
  train = _documents(2, 3)
  after = [b"def x" + bytes([i]) for i in range(256)]
  prefix = text.ngram_bits(train, [b"def x"], order=4) * 5
  each = [text.ngram_bits(train, [a], order=4) * 6 - prefix for a in after]
  assert sum(2**-b for b in each) == pytest.approx(1.0, rel=1e-6)


def test_order_is_bounded():
  with pytest.raises(ValueError, match="between 1 and 7"):
    text.ngram_bits([b"a"], [b"a"], order=8)


def test_compressors():
  noise = np.random.default_rng(0).bytes(20_000)
  assert 8.0 <= text.gzip_bits([noise]) < 8.1
  assert 8.0 <= text.xz_bits([noise]) < 8.1
  # gzip sees 32 KiB back, xz the whole text.
  wide = np.random.default_rng(1).bytes(50_000)
  assert text.gzip_bits([wide, wide]) > 8.0
  assert text.xz_bits([wide, wide]) < 4.2
