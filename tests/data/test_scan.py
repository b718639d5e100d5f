"""Scans: one shape, one place, finite intensities, whole labels."""

import numpy as np
import pytest

from isthmus.data import scan

nibabel = pytest.importorskip("nibabel")

AFFINE = np.array([[0, 2.0, 0, 5], [1, 0, 0, 7], [0, 0, 3, 1], [0, 0, 0, 1]])


@pytest.fixture
def save(tmp_path):
  def save(name, array, affine=AFFINE):
    path = tmp_path / name
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path

  return save


def test_shapes(save):
  one = save("a.nii", np.ones((2, 3, 4), np.int16))
  same = save("b.nii.gz", np.ones((2, 3, 4), np.float32))
  other = save("c.nii", np.ones((2, 3, 5), np.int16))
  four = save("d.nii", np.ones((2, 3, 4, 1), np.int16))
  assert scan.read_shape([one, same]) == (4, 3, 2)
  with pytest.raises(
    ValueError, match=r"c.nii' has shape \(2, 3, 5\), 'a.nii' has \(2, 3, 4\)"
  ):
    scan.read_shape([one, same, other])
  with pytest.raises(ValueError, match=r"d.nii' has .* \(2, 3, 4, 1\)"):
    scan.read_shape([four])
  with pytest.raises(ValueError, match="d.nii' has shape"):
    scan.read_shape([one, four])
  with pytest.raises(ValueError, match="max_bytes is 399"):
    scan.read_shape([one], max_bytes=399)


def test_images(save):
  array = np.arange(24.0).reshape(2, 3, 4)
  volume = scan.read_image(save("a.nii", array))
  assert volume.data.dtype == np.float32
  np.testing.assert_array_equal(volume.data, array.astype(np.float32))
  for bad in (np.nan, np.inf, 1e300):
    array[1, 1] = bad
    with pytest.raises(ValueError, match="a.nii' has 4 voxels not finite"):
      scan.read_image(save("a.nii", array))
  with pytest.raises(ValueError, match="max_bytes is 399"):
    scan.read_image(save("a.nii", array), max_bytes=399)


def test_labels(save):
  array = np.arange(24.0).reshape(2, 3, 4) - 5
  volume = scan.read_label(save("a.nii", array))
  assert volume.data.dtype == np.int32
  np.testing.assert_array_equal(volume.data, array)
  for bad in (0.5, 2.0**31, np.nan):
    array[0, 0, 0] = bad
    with pytest.raises(ValueError, match="a.nii' has labels that are not int"):
      scan.read_label(save("a.nii", array))


def test_places(save):
  array = np.ones((2, 3, 4), np.int16)
  here = scan.read_label(save("a.nii", array))
  near = scan.read_label(save("b.nii", array, AFFINE + 1e-5))
  scan.check_place("b.nii", near, like="a.nii", other=here)
  there = scan.read_label(save("c.nii", array, AFFINE * [[-1], [1], [1], [1]]))
  with pytest.raises(ValueError, match="^'x/c.nii' lies elsewhere than 'a.nii"):
    scan.check_place("x/c.nii", there, like="x/a.nii", other=here)
