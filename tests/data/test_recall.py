"""Facts in text: all there twice, where they should be, with their answers."""

import re

import numpy as np
import pytest

from isthmus.data.recall import NAMES, Facts
from isthmus.data.tokenizer import Bytes

LINE = re.compile(r"\n# The secret number of (\w+) is (\d+)")


def made(count=4, digits=5, t=600, seed=0):
  hay = np.full(t, 122, np.int32)
  facts = Facts(Bytes(), count=count, digits=digits)
  row, marks = facts(hay, np.random.default_rng(seed))
  assert row.shape == marks.shape == (t,) and row.dtype == np.int32
  assert (hay == 122).all()
  return row, marks


@pytest.mark.parametrize("count, digits", [(1, 1), (3, 5), (6, 3)])
def test_every_fact_is_told_and_asked_for(count, digits):
  row, marks = made(count, digits)
  lines = LINE.findall(Bytes().decode(row))
  assert len(lines) == 2 * count and len(set(lines)) == count
  told, asked = lines[:count], lines[count:]
  assert [name for name, _ in told] == list(NAMES[:count])
  assert all(len(number) == digits for _, number in told)
  numbers = dict(told)
  for i in range(1, count + 1):
    assert Bytes().decode(row[marks == i]) == numbers[NAMES[i - 1]]
  # In the order of the questions, at the end.
  order = [i for i in dict.fromkeys(marks.tolist()) if i]
  assert [NAMES[i - 1] for i in order] == [name for name, _ in asked]
  assert marks[-1] == order[-1] and set(marks) == set(range(count + 1))


def test_facts_are_evenly_spread():
  row, _ = made(4)
  sizes = [len(piece) for piece in re.findall("z+", Bytes().decode(row))]
  room = sum(sizes)
  assert len(sizes) == 5 and room == (row == 122).sum()
  at = np.cumsum(sizes)[:4] / room
  np.testing.assert_allclose(at, [1 / 8, 3 / 8, 5 / 8, 7 / 8], atol=1 / room)


def test_numbers_and_order_are_drawn():
  first, again, other = made(seed=1), made(seed=1), made(seed=2)
  np.testing.assert_array_equal(first[0], again[0])
  assert (first[0] != other[0]).any()
  orders = {tuple(dict.fromkeys(made(seed=s)[1].tolist())) for s in range(6)}
  assert len(orders) > 2


def test_refused():
  for count in (0, len(NAMES) + 1):
    with pytest.raises(ValueError, match=f"count is {count}"):
      Facts(Bytes(), count=count)
  with pytest.raises(ValueError, match="digits is 0"):
    Facts(Bytes(), digits=0)
  with pytest.raises(ValueError, match="are 75 tokens; the row has 74"):
    Facts(Bytes(), count=1)(np.zeros(74, np.int32), np.random.default_rng(0))
