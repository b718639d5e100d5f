"""Every pair of settings against the oracle, for each implementation."""

import itertools

import jax
import numpy as np
import pytest

from tests.attention.cover import (
  DTYPES,
  HEADS,
  KINDS,
  LENGTHS,
  WIDTHS,
  Case,
  cases,
  check,
  pairs,
  settings,
  takes,
)
from tests.attention.oracle import by_hand, inputs, oracle, wide_vjp

pytestmark = pytest.mark.once

# Up to 512 tokens on a CPU; the oracle there is float64.
CPU = {name: cases(name, 512) for name in ("xla", "chunked")}
GPU = {name: cases(name, 4096) for name in ("mosaic", "cudnn", "chunked")}


def some(backends, shares=None):
  """Parameters; of a backend's cases one in `shares[name]` isn't slow."""
  marks, shares = ((), (pytest.mark.slow,)), shares or {}
  return [
    pytest.param(
      name,
      case,
      id=f"{name}-{case}",
      marks=marks[i % shares.get(name, 1) > 0],
    )
    for name, found in backends.items()
    for i, case in enumerate(found)
  ]


@pytest.mark.parametrize("impl, case", some(CPU, {"xla": 10, "chunked": 5}))
def test_equals_oracle(impl, case):
  assert check(case, impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl, case", some(GPU))
def test_equals_oracle_on_gpu(impl, case):
  """An implementation asked by name that refuses what it is to take fails."""
  errors = check(case, impl)
  assert errors.keys() >= {"o", "dq", "dk", "dv"}
  worst = max(error / allowed for error, allowed in errors.values())
  print(f"{impl} ran {case}: at most {worst:.2f} of what is allowed")


@pytest.mark.parametrize(
  "name, longest",
  [("xla", 512), ("mosaic", 4096), ("cudnn", 4096), ("chunked", 4096)],
)
def test_the_cover_holds_every_pair(name, longest):
  """And is not many, and is the same again."""
  found = cases(name, longest)
  assert len(found) <= 150 and found == {**CPU, **GPU}.get(name, found)
  assert all(takes(name, case) for case in found)
  held = set().union(*(pairs(tuple(vars(case).values())) for case in found))
  lengths = [x for x in LENGTHS if max(x) <= longest]
  for values in itertools.product(DTYPES, HEADS, KINDS, WIDTHS, lengths):
    if takes(name, Case(*values)):
      assert pairs(values) <= held, values


@pytest.mark.parametrize("kind", ["softcap", "sinks", "window"])
def test_the_oracle_by_hand_is_that_by_differentiation(kind):
  case = Case("float32", (9, 3), kind, (8, 12), (14, 9))
  kwargs, arrays, mask = settings(case, 2, (4, 4))
  q, k, v, do, dlse = inputs(2, 14, 9, 9, 3, 8, 12)
  args = [q, k, v, *arrays.values()]
  cap = kwargs.get("softcap")

  def written(q, k, v, sinks=None):
    return oracle(q, k, v, mask, softcap=cap, sinks=sinks)

  one = wide_vjp(written, args, do, dlse)
  other = by_hand(args, do, dlse, mask, softcap=cap)
  assert kind == "sinks" or not mask.any(-1).all()
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-12)
