"""What fits an annotation, and as what; the names of dtypes."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Optional

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train import annotation


@pytest.mark.parametrize(
  "value, hint, fitted",
  [
    (3, int, 3),
    (3, float, 3.0),
    (3, Optional[float], 3.0),  # noqa: UP045
    (None, float | None, None),
    (3, Annotated[float, "metres"], 3.0),
    ("b", Literal["a", "b"], "b"),
    ([1, 2], tuple[int, int], (1, 2)),
    ((1, 2.5), tuple[float, ...], (1.0, 2.5)),
    ((1, 2), list[float], [1.0, 2.0]),
    ([1, 2], Sequence[int], (1, 2)),
    ((), tuple, ()),
    ("x", Any, "x"),
    (True, bool, True),
  ],
)
def test_fits(value, hint, fitted):
  ok, found = annotation.fit(value, hint)
  assert ok and found == fitted and type(found) is type(fitted)


@pytest.mark.parametrize(
  "value, hint",
  [
    (3.5, int),
    (True, int),
    (True, float),
    (float("nan"), float),
    ("3", int),
    (1, Literal[True, "a"]),
    ([1, 2, 3], tuple[int, int]),
    ([1, "x"], list[int]),
    (None, int),
    (1, None),
  ],
)
def test_does_not_fit(value, hint):
  assert not annotation.fit(value, hint)[0]


def test_dtypes():
  assert annotation.dtype("jnp.bfloat16") == jnp.bfloat16
  assert annotation.dtype("'int8'") == np.int8
  for text in ("f4,f4", "O", "3i", "object", "str", "9" * 5000, "bool"):
    with pytest.raises(TypeError):
      annotation.dtype(text)
  assert annotation.is_dtype(jnp.float32, Any)
  assert annotation.is_dtype(None, "jnp.dtype | None")
  assert not annotation.is_dtype((1, 2), Any)
  assert not annotation.is_dtype(3, int)
