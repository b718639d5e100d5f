"""The maps: their values by another route, and their extremes."""

import numpy as np
import pytest

from isthmus.pallas.quant8.maps import (
  NOZERO,
  ROOT,
  SIGNED,
  UNSIGNED,
  Map,
  table,
)

pytestmark = pytest.mark.once


def dynamic(signed):
  """As the paper tells it: means of neighbouring edges, decade by decade."""
  values = [0.0, 1.0]
  for decade in range(7):
    edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
    means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
    values += [*means, *(-means if signed else ())]
  return np.sort(values)


@pytest.mark.parametrize(
  "which", [SIGNED, UNSIGNED], ids=("signed", "unsigned")
)
def test_dynamic_maps_are_means_of_edges(which):
  np.testing.assert_allclose(table(which), dynamic(which.signed), rtol=2e-7)
  assert len(set(table(which).tolist())) == 256


def test_extremes_of_dynamic_maps():
  signed, unsigned = table(SIGNED), table(UNSIGNED)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6)
  close(signed[[0, 128, 129, 130]], [-0.99296875, 5.5e-7, 3.25e-6, 7.75e-6])
  close(unsigned[[1, 2, 3]], [3.25e-7, 7.75e-7, 2.125e-6])
  assert signed[127] == 0 and unsigned[0] == 0
  assert signed[255] == 1 and unsigned[255] == 1
  assert abs(signed.astype(np.float64).sum() - 1) < 1e-6


def test_linear_maps():
  signed = table(Map(kind="linear"))
  np.testing.assert_allclose(signed[:255], np.linspace(-1, 1, 255), atol=1e-7)
  unsigned = table(Map(kind="linear", signed=False))
  np.testing.assert_allclose(unsigned, np.linspace(0, 1, 256), atol=1e-7)


@pytest.mark.parametrize(
  "which", [SIGNED, UNSIGNED, NOZERO, ROOT, Map(kind="linear")], ids=str
)
def test_codes_of_zero_and_one(which):
  assert table(which)[which.zero] == 0 and table(which)[which.top] == 1


def test_roots_with_a_sign_are_refused():
  with pytest.raises(ValueError, match="square roots is unsigned"):
    Map(root=True)
