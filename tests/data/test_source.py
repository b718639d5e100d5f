"""Array sources, and how a wrong split is refused."""

import numpy as np
import pytest

from isthmus.data.digits import Digits
from isthmus.data.image import ImageFolder
from isthmus.data.library import PythonLibrary
from isthmus.data.source import Arrays, ArraySource, Dataset, Source
from isthmus.data.text import Text
from isthmus.data.tfds import Tfds

DATASETS = [
  Arrays(train={"x": np.arange(3)}, eval={"x": np.arange(2)}),
  Digits(),
  ImageFolder("nowhere", size=8),
  Text(PythonLibrary(), seq_len=8),
  Tfds("no_such_set"),
]


@pytest.mark.parametrize("data", DATASETS, ids=lambda d: type(d).__name__)
def test_unknown_split_names_the_splits_and_the_nearest(data):
  assert isinstance(data, Dataset)
  with pytest.raises(ValueError, match=r"'eval', 'train'.*mean 'train'"):
    data.open("training")


@pytest.mark.parametrize("data", DATASETS[1:], ids=lambda d: type(d).__name__)
def test_settings_are_hashable_and_comparable(data):
  assert hash(data) == hash(type(data)(**_fields(data)))
  assert data == type(data)(**_fields(data))


def _fields(data):
  return {name: getattr(data, name) for name in data.__dataclass_fields__
          if name != "_"}  # fmt: skip


def test_array_source_gives_rows_one_by_one_and_together():
  source = ArraySource({"x": np.arange(6).reshape(3, 2), "y": [1, 2, 3]})
  assert isinstance(source, Source)
  assert len(source) == 3
  assert source[2]["x"].tolist() == [4, 5]
  taken = source.take(np.array([2, 0]))
  assert taken["x"].tolist() == [[4, 5], [0, 1]]
  assert taken["y"].tolist() == [3, 1]


def test_array_source_refuses_unequal_scalar_and_absent_fields():
  with pytest.raises(ValueError, match="'y' has 2 rows, field 'x' has 3"):
    ArraySource({"x": np.zeros(3), "y": np.zeros(2)})
  with pytest.raises(ValueError, match="'y' is a scalar"):
    ArraySource({"x": np.zeros(3), "y": 1.0})
  with pytest.raises(ValueError, match="0 arrays"):
    ArraySource({})


def test_arrays_without_eval_name_the_split_they_have():
  data = Arrays(train={"x": np.arange(3)})
  assert len(data.open("train")) == 3
  with pytest.raises(ValueError, match=r"no split 'eval'; there are \['train'"):
    data.open("eval")
