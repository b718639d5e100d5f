"""Values of volumes between voxels: trilinear, and the nearest one."""

import numpy as np
from jaxtyping import Float32, Int


def trilinear(
  image: Float32[np.ndarray, "z y x c"],
  at: Float32[np.ndarray, "3 *place"],
) -> Float32[np.ndarray, "*place c"]:
  """The image at any places, from the eight voxels about each.

  Args:
    image: [z y x c].
    at: z, y, x of each place, in voxels. Outside of the image is its mirror
      image, about the centres of its outermost voxels.

  Returns:
    [... c].

  Example:
    >>> image = np.arange(8, dtype=np.float32).reshape(2, 2, 2, 1)
    >>> trilinear(image, np.float32([[0.5], [0.5], [0.5]]))
    array([[3.5]], dtype=float32)
  """
  shape, channels = image.shape[:3], image.shape[3]
  flat = image.reshape(-1, channels)
  steps = (shape[1] * shape[2], shape[2], 1)
  first, parts, offsets = np.zeros(at.shape[1:], np.intp), [], []
  for place, n, step in zip(at, shape, steps, strict=True):
    place = _fold(place, n)
    low = np.minimum(place.astype(np.intp), max(n - 2, 0))
    parts.append((place - low.astype(np.float32)).reshape(-1, 1))
    offsets.append(step if n > 1 else 0)
    first += low * step
  first = first.ravel()

  def between(axis: int, offset: int) -> np.ndarray:
    if axis == 3:
      return flat.take(first + offset, axis=0)
    low = between(axis + 1, offset)
    high = between(axis + 1, offset + offsets[axis])
    high -= low
    high *= parts[axis]
    high += low
    return high

  return between(0, 0).reshape(*at.shape[1:], channels)


def nearest(
  label: Int[np.ndarray, "z y x"],
  at: Float32[np.ndarray, "3 *place"],
) -> Int[np.ndarray, "*place"]:
  """The label of the voxel whose centre is the nearest; see `trilinear`.

  Example:
    >>> label = np.arange(8).reshape(2, 2, 2)
    >>> nearest(label, np.float32([[0.1, 0.9], [0, 0], [0.6, 1.2]])).tolist()
    [1, 5]
  """
  first = np.zeros(at.shape[1:], np.intp)
  steps = (label.shape[1] * label.shape[2], label.shape[2], 1)
  for place, n, step in zip(at, label.shape, steps, strict=True):
    # Halves are rounded up, as a cast cuts off.
    first += (_fold(place, n) + np.float32(0.5)).astype(np.intp) * step
  return label.ravel().take(first)


def _fold(place: np.ndarray, n: int) -> np.ndarray:
  """Places along an axis of n voxels, mirrored into [0, n - 1]."""
  last = np.float32(n - 1)
  if n == 1:
    return np.zeros_like(place)
  place = np.abs(place)
  if place.max(initial=0) > last:
    place = last - np.abs(np.mod(place, 2 * last) - last)
  return place
