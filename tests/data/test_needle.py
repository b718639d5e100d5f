"""Needles: lines come twice, what counts can be known, nothing overlaps."""

import re

import numpy as np
import pytest

from isthmus.data.needle import DIGITS, LENGTH, Needles

LINE = re.compile(rb"\n# key (\d{4}) = (\d{6})\n")


def row(t=400):
  return {
    "tokens": np.full(t + 1, 97, np.int32),
    "segment_ids": np.ones(t + 1, np.int32),
    "weights": np.ones(t, np.float32),
  }


def text(tokens):
  return bytes(tokens.astype(np.uint8))


@pytest.mark.parametrize("pairs", [1, 5, 9])
def test_every_key_comes_twice_with_one_value(pairs):
  for seed in range(5):
    before = row()
    found = Needles(pairs=pairs)(before, np.random.default_rng(seed))
    lines = LINE.findall(text(found["tokens"]))
    assert len(lines) == 2 * pairs and len(set(lines)) == pairs
    assert len({key for key, _ in lines}) == pairs
    assert (before["tokens"] == 97).all() and (before["weights"] == 1).all()
    assert (found["tokens"] == 97).sum() == 401 - 2 * pairs * LENGTH


def test_of_the_lines_the_second_values_count():
  found = Needles(pairs=4)(row(), np.random.default_rng(3))
  tokens, weights = text(found["tokens"]), found["weights"]
  seen, counted = set(), np.ones(401)
  for line in LINE.finditer(tokens):
    counted[line.start() : line.end()] = 0
    if line[1] in seen:
      counted[line.start(2) : line.end(2)] = 1
    seen.add(line[1])
  # weights[i] is of token i + 1.
  np.testing.assert_array_equal(weights, counted[1:])
  assert 0 < weights.sum() < 400


def test_a_share_of_rows():
  plain, rng = row(), np.random.default_rng(0)
  none = Needles(share=0.0)(plain, rng)
  assert none is plain
  planted = [Needles(share=0.3)(plain, rng) is not plain for _ in range(500)]
  assert 0.2 < np.mean(planted) < 0.4


def test_rows_depend_on_the_generator_alone():
  a, b, c = (
    Needles(pairs=3)(row(), np.random.default_rng(seed))["tokens"]
    for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()


@pytest.mark.parametrize("pairs", [1, 4, 17])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_a_probe_asks_for_the_needle_at_its_depth(pairs, depth):
  rng = np.random.default_rng(7)
  tokens, asked = Needles(pairs=pairs).probe(row()["tokens"], rng, depth=depth)
  said = text(tokens)
  lines = list(LINE.finditer(said))
  assert len(lines) == pairs + 1
  last = lines[-1]
  assert last.end() == len(tokens) == 401
  assert np.flatnonzero(asked).tolist() == list(range(*last.span(2)))
  assert asked.sum() == DIGITS
  (first,) = (x for x in lines[:-1] if x[1] == last[1])
  assert first[2] == last[2]
  room = len(tokens) - 2 * LENGTH
  # Where there is little room, its neighbours may keep it from its place.
  slack = 0 if pairs == 1 else 0.3 if pairs == 4 else 0.15
  assert abs(first.start() / room - depth) <= slack + 1 / room


def test_refusals():
  rng = np.random.default_rng(0)
  for call, words in (
    (lambda: Needles(pairs=0), "pairs is 0"),
    (lambda: Needles(share=1.5), "share is 1.5"),
    (lambda: Needles(pairs=9)(row(300), rng), "18 lines of 21 bytes"),
    (
      lambda: Needles().probe(row()["tokens"], rng, depth=1.1),
      "depth is 1.1",
    ),
    (
      lambda: Needles(pairs=3).probe(row(60)["tokens"], rng, depth=0.0),
      "3 lines of 21 bytes don't fit",
    ),
  ):
    with pytest.raises(ValueError, match=words):
      call()
