"""A small TFDS builder of our own, written as array_record."""

import os
import pathlib
import time

import numpy as np
import tensorflow_datasets as tfds


class Squares(tfds.core.GeneratorBasedBuilder):
  """Numbers, their squares, and a text that says so."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Tensor(
          shape=(4, 4, 1), dtype=np.uint8, encoding="zlib"
        ),
        "label": tfds.features.ClassLabel(num_classes=30),
        "text": tfds.features.Text(),
        "nested": {"square": tfds.features.Scalar(np.int64)},
      }
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    if log := os.environ.get("SQUARES_LOG"):
      pathlib.Path(log, f"prepared-{os.getpid()}").touch()
      time.sleep(0.5)
    return {
      "train": self._generate_examples(0, 20),
      "test": self._generate_examples(20, 25),
    }

  def _generate_examples(self, begin, end):
    for i in range(begin, end):
      yield (
        i,
        {
          "image": np.full((4, 4, 1), i, np.uint8),
          "label": i,
          "text": f"{i} squared ünd",
          "nested": {"square": i * i},
        },
      )
