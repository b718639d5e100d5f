"""The suite of every data set `open(split) -> source`.

A data set is one `Entry` in `test_sources.py`; each function here takes an
entry and raises AssertionError with the entry's name and what doesn't hold.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from isthmus.data import Dataset, Loader, Source

# Examples that a check looks at, spread over the split.
LOOK = 24
# Of a large split, whose every example is compared with the other split's.
ALL = 4000


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Entry:
  """A data set under test.

  Attributes:
    name: of the entry.
    build: `build(folder)` makes the data set; what it needs on disk it writes
      into the empty folder, unless it is there from an earlier call.
    shapes: field -> shape of an example's array; None for text.
    needs: packages and modules without which the entry is skipped.
    plain: the settings compare and hash, as those of a frozen dataclass do.
  """

  name: str
  build: Callable[[Any], Dataset]
  shapes: dict[str, tuple[int, ...] | None]
  needs: tuple[str, ...] = ()
  plain: bool = True


def digest(example: dict[str, Any]) -> bytes:
  """A hash of all that an example holds."""
  state = hashlib.blake2b(digest_size=16)
  for name in sorted(example):
    value = example[name]
    text = isinstance(value, bytes | str)
    state.update(repr(value).encode() if text else np.asarray(value).tobytes())
  return state.digest()


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
  """Whether two examples are equal to the bit, shapes and dtypes included."""
  return a.keys() == b.keys() and all(
    np.shape(a[k]) == np.shape(b[k])
    and np.asarray(a[k]).dtype == np.asarray(b[k]).dtype
    and np.array_equal(a[k], b[k])
    for k in a
  )


@functools.cache
def setting(entry: Entry, folder: Any) -> tuple[Dataset, dict[str, Source]]:
  """(data set, its sources), opened once for all checks."""
  data = entry.build(folder)
  return data, {split: data.open(split) for split in ("train", "eval")}


def places(source: Source, count: int = LOOK) -> list[int]:
  """Some indices of a source, its first and last among them."""
  return np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist()


def assert_splits_open(entry: Entry, folder: Any) -> None:
  """Both splits open and are not empty; another is refused with its nearest."""
  data, sources = setting(entry, folder)
  assert isinstance(data, Dataset), f"{entry.name}: no open(split)"
  for split, source in sources.items():
    assert isinstance(source, Source), f"{entry.name}: {split} is no Source"
    assert len(source), f"{entry.name}: {split} is empty"
  for wrong, near in (("training", "train"), ("evaluate", "eval")):
    try:
      data.open(wrong)
    except ValueError as error:
      said = str(error)
      assert f"did you mean {near!r}" in said, f"{entry.name}: {said}"
    else:
      raise AssertionError(f"{entry.name}: split {wrong!r} was opened")


def assert_settings_are_plain(entry: Entry, folder: Any) -> None:
  """The settings are frozen, print, and compare with themselves built anew."""
  data, _ = setting(entry, folder)
  assert dataclasses.is_dataclass(data), f"{entry.name}: no dataclass"
  for field in dataclasses.fields(data):
    try:
      setattr(data, field.name, getattr(data, field.name))
    except dataclasses.FrozenInstanceError:
      continue
    raise AssertionError(f"{entry.name}: {field.name} can be set")
  assert type(data).__name__ in repr(data), f"{entry.name}: {data!r}"
  if entry.plain:
    again = entry.build(folder)
    assert again is not data, f"{entry.name}: build gave the same object"
    assert again == data, f"{entry.name}: {again} != {data}"
    assert hash(again) == hash(data), f"{entry.name}: hashes differ"


def assert_examples_are_alike(entry: Entry, folder: Any) -> None:
  """Every example of both splits has the fields, shapes and dtypes stated."""
  _, sources = setting(entry, folder)
  dtypes: dict[str, Any] = {}
  for split, source in sources.items():
    for i in places(source):
      example, at = source[i], f"{entry.name}: {split}[{i}]"
      assert set(example) == set(entry.shapes), f"{at} has {sorted(example)}"
      for name, shape in entry.shapes.items():
        value = example[name]
        if shape is None:
          assert isinstance(value, bytes | str), f"{at}: {name} is {value!r}"
          continue
        found = np.shape(value)
        assert found == shape, f"{at}: {name} has {found}, not {shape}"
        dtype = np.asarray(value).dtype
        kept = dtypes.setdefault(name, dtype)
        assert dtype == kept, f"{at}: {name} is {dtype}, elsewhere {kept}"


def assert_numbers_are_finite(entry: Entry, folder: Any) -> None:
  """Numbers are finite, and not the same in all examples."""
  _, sources = setting(entry, folder)
  seen = set()
  for split, source in sources.items():
    for i in places(source):
      example = source[i]
      seen.add(digest(example))
      for name, value in example.items():
        if not isinstance(value, bytes | str):
          bad = f"{entry.name}: {split}[{i}] has a {name} that is not finite"
          assert np.isfinite(value).all(), bad
  assert len(seen) > 1, f"{entry.name}: all examples are the same"


def assert_opening_again_changes_nothing(entry: Entry, folder: Any) -> None:
  """Opened again, and read in another order, the examples are the same."""
  data, sources = setting(entry, folder)
  for split, source in sources.items():
    again = entry.build(folder).open(split)
    lengths = f"{entry.name}: {split} has {len(source)} and {len(again)}"
    assert len(again) == len(source), lengths
    first = {i: source[i] for i in places(source)}
    for i in reversed(first):
      equal = same(first[i], again[i]) and same(first[i], source[i])
      assert equal, f"{entry.name}: {split}[{i}] differs when read again"


def assert_splits_share_no_example(entry: Entry, folder: Any) -> None:
  """No example is in both splits."""
  _, sources = setting(entry, folder)
  known = {
    split: {digest(source[i]): i for i in places(source, ALL)}
    for split, source in sources.items()
  }
  for key in known["train"].keys() & known["eval"].keys():
    pair = f"train[{known['train'][key]}] and eval[{known['eval'][key]}]"
    raise AssertionError(f"{entry.name}: {pair} are the same")


def assert_several_are_as_one_by_one(entry: Entry, folder: Any) -> None:
  """`take` and `__getitems__`, where there are any, agree with indexing."""
  _, sources = setting(entry, folder)
  for split, source in sources.items():
    indices = places(source)[::-1]
    singly = [source[i] for i in indices]
    ways = {}
    if hasattr(source, "take"):
      stacked = source.take(np.array(indices))
      rows = zip(*stacked.values(), strict=True)
      ways["take"] = [dict(zip(stacked, row, strict=True)) for row in rows]
    if hasattr(source, "__getitems__"):
      ways["__getitems__"] = source.__getitems__(indices)
    for way, found in ways.items():
      equal = all(map(same, found, singly)) and len(found) == len(singly)
      assert equal, f"{entry.name}: {way} of {split} differs from indexing"


def assert_the_end_is_the_end(entry: Entry, folder: Any) -> None:
  """An index past the end raises an IndexError, as a sequence's does."""
  _, sources = setting(entry, folder)
  for split, source in sources.items():
    try:
      source[len(source)]
    except IndexError:
      continue
    raise AssertionError(f"{entry.name}: {split} goes on after its length")


def assert_loader_gives_what_it_says(entry: Entry, folder: Any) -> None:
  """A batch of the loader holds the examples that it says it does."""
  _, sources = setting(entry, folder)
  text = {name for name, shape in entry.shapes.items() if shape is None}
  drop = lambda e, rng: {k: v for k, v in e.items() if k not in text}
  for split, source in sources.items():
    loader = Loader(
      source, batch_size=3, seed=0, transform=drop if text else None
    )
    batch = loader.batch(1)
    assert set(batch) == set(entry.shapes) - text, f"{entry.name}: {set(batch)}"
    for row, i in enumerate(loader.indices(1).tolist()):
      for name, values in batch.items():
        equal = np.array_equal(values[row], np.asarray(source[i][name]))
        assert equal, f"{entry.name}: {split}, row {row} is not example {i}"


CHECKS = [
  assert_splits_open,
  assert_settings_are_plain,
  assert_examples_are_alike,
  assert_numbers_are_finite,
  assert_opening_again_changes_nothing,
  assert_splits_share_no_example,
  assert_several_are_as_one_by_one,
  assert_the_end_is_the_end,
  assert_loader_gives_what_it_says,
]
