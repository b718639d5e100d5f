"""scikit-learn's handwritten digits: real images that ship with a package."""

import dataclasses

import numpy as np

from isthmus.data.permutation import permute
from isthmus.data.source import ArraySource, check_split

_EVAL = 360


@dataclasses.dataclass(frozen=True)
class Digits:
  """1,797 handwritten digits, 1,437 to train on and 360 held out.

  An example holds image float32 [8, 8, 1] in [0, 1] and label int32 [].

  Raises:
    ImportError: when opened, where scikit-learn is missing.

  Example:
    >>> Digits().open("train")[0]["image"].shape
    (8, 8, 1)

  Reference:
    Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI
    Machine Learning Repository, 1998.
  """

  def open(self, split: str) -> ArraySource:
    """The examples of a split, "train" or "eval"."""
    check_split(split)
    try:
      from sklearn.datasets import load_digits
    except ImportError as error:
      raise ImportError(
        "Digits needs the package scikit-learn: pip install 'isthmus[data]'"
      ) from error
    digits = load_digits()
    # Neighbours in the file come from the same writers.
    order = permute(np.arange(len(digits.images)), len(digits.images), 0)
    order = order[:_EVAL] if split == "eval" else order[_EVAL:]
    images = (digits.images[order] / 16).astype(np.float32)[..., None]
    labels = digits.target[order].astype(np.int32)
    return ArraySource({"image": images, "label": labels})
