"""Resampling against scipy's, at places inside and outside."""

import numpy as np
import pytest
import scipy.ndimage

from isthmus.data.resample import nearest, trilinear

pytestmark = pytest.mark.once


@pytest.mark.parametrize("shape", [(5, 6, 7), (2, 9, 4), (1, 4, 3)])
def test_against_scipy(shape):
  rng = np.random.default_rng(0)
  image = rng.normal(size=(*shape, 3)).astype(np.float32)
  label = rng.integers(0, 9, shape)
  at = rng.uniform(-25, 25, (3, 11, 13)).astype(np.float32)
  found = trilinear(image, at)
  assert found.shape == (11, 13, 3) and found.dtype == np.float32
  for i in range(3):
    wanted = scipy.ndimage.map_coordinates(
      image[..., i].astype(np.float64), at, order=1, mode="mirror"
    )
    np.testing.assert_allclose(found[..., i], wanted, atol=1e-4)
  wanted = scipy.ndimage.map_coordinates(label, at, order=0, mode="mirror")
  np.testing.assert_array_equal(nearest(label, at), wanted)


def test_at_the_voxels_themselves():
  image = np.random.default_rng(0).normal(size=(4, 5, 6, 2)).astype(np.float32)
  at = np.indices((4, 5, 6)).astype(np.float32)
  np.testing.assert_allclose(trilinear(image, at), image, atol=1e-6)
  label = np.arange(120).reshape(4, 5, 6)
  np.testing.assert_array_equal(nearest(label, at), label)
