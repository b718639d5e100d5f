"""Patches: every voxel covered, cut where they say, nothing written back."""

import itertools

import numpy as np
import pytest

from isthmus.data.patch import PatchSource, box, check_size, cover, three


@pytest.mark.parametrize("stride", [None, 1, 3, 5])
@pytest.mark.parametrize("shape", [(4, 5, 6), (9, 4, 4), (5, 11, 7)])
def test_patches_cover_the_volume_and_stay_within(shape, stride):
  size = (4, 3, 2)
  corners = cover(shape, size, stride=stride, name="it")
  seen = np.zeros(shape, int)
  for corner in corners.tolist():
    cut = seen[box(corner, size)]
    assert cut.shape == size
    cut += 1
  assert len({tuple(c) for c in corners.tolist()}) == len(corners)
  assert seen[0, 0, 0] and seen[-1, -1, -1]
  if stride is None or stride <= min(size):
    assert seen.min() >= 1
  if stride == 1:
    everywhere = itertools.product(
      *(range(n - s + 1) for n, s in zip(shape, size, strict=True))
    )
    assert {tuple(c) for c in corners.tolist()} == set(everywhere)


def test_patch_larger_than_its_volume():
  with pytest.raises(ValueError, match=r"^it has \(4, 5, 6\) .* \(5, 5, 5\);"):
    cover((4, 5, 6), 5, name="it")
  assert cover((4, 5, 6), None, name="it").tolist() == [[0, 0, 0]]


def test_source_cuts_copies_and_scales():
  image = np.arange(2 * 6 * 5 * 4 * 2, dtype=np.float64).reshape(2, 6, 5, 4, 2)
  label = np.arange(2 * 6 * 5 * 4).reshape(2, 6, 5, 4).astype(np.uint8)
  image.setflags(write=False)
  load = lambda i: (image[i], label[i] if i else None)
  rows = np.array([[1, 2, 1, 0], [0, 0, 0, 0]])
  source = PatchSource(load, rows, (3, 2, 4), scale=0.5)
  example = source[0]
  np.testing.assert_array_equal(
    example["image"], image[1, 2:5, 1:3] * 0.5, strict=False
  )
  assert example["image"].dtype == np.float32
  assert example["label"].dtype == np.int32
  np.testing.assert_array_equal(example["label"], label[1, 2:5, 1:3])
  example["image"][:] = 0
  assert source[0]["image"].any()
  assert set(source[1]) == {"image"} and len(source) == 2
  whole = PatchSource(load, rows[1:], None)
  np.testing.assert_array_equal(whole[0]["image"], image[0])


def test_sizes_and_strides():
  assert three(3) == (3, 3, 3) and three((1, 2, 3)) == (1, 2, 3)
  check_size(None, None)
  check_size((1, 2, 3), 1)
  for size, stride, cause in (
    (0, None, "size is 0"),
    ((1, 2, -3), None, r"size is \(1, 2, -3\)"),
    (4, 0, "stride is 0"),
    (None, 2, "stride is 2 and size None"),
  ):
    with pytest.raises(ValueError, match=cause):
      check_size(size, stride)
