"""Volumes and labels, turned, stretched, bent, flipped, in other contrast."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Float32

from isthmus.data.resample import nearest, trilinear
from isthmus.data.source import Example

_AXES = "zyx"
# Standard deviations of the kernel that the elastic deformation looks at.
_REACH = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment3D:
  """A loader's transform of image float32 [z y x c] and label [z y x].

  The image is taken at, and the label from the nearest voxel to,

    centre + scale * rotation (place - centre) + displacement(place),

  once for all of them, so they stay aligned; outside of the volume is its
  mirror image. Then axes are flipped and intensities changed, where the image
  isn't 0 in all channels, for that is no tissue. Without a label the image is
  changed alone; other fields stay as they are.

  Every part has draws of its own: to turn one off, or to change how far it
  goes, changes nothing in the others.

  Args:
    degrees: the most that it is turned, about an axis of any direction; 0
      turns it off. Voxels are taken as cubes.
    scale: the most by which it is shrunk or enlarged, 1 / scale to scale,
      evenly on a log scale; 1 turns it off.
    flip: axes that are flipped half of the time, some of "zyx"; "" for none.
    elastic: the largest standard deviation of the displacement, in voxels;
      each example has its own, evenly from 0. It is white noise smoothed by a
      Gaussian; 0 turns it off.
    sigma: standard deviation of that Gaussian, in voxels.
    intensity: a channel is multiplied by 1 - intensity to 1 + intensity, then
      -intensity to intensity is added; 0 turns it off.
    gamma: a channel's tissue is scaled to [0, 1], raised to the power 1 /
      gamma to gamma, evenly on a log scale, and scaled back; 1 turns it off.

  Raises:
    ValueError: numbers outside of their ranges, axes that aren't; `elastic`
      above a quarter of sigma, where volumes begin to fold; when called, an
      example without an image [z y x c], or a label of another shape.

  Example:
    >>> augment = Augment3D(degrees=0.0, elastic=0.0)
    >>> example = {"image": np.ones((8, 8, 8, 1), np.float32)}
    >>> augment(example, np.random.default_rng(0))["image"].shape
    (8, 8, 8, 1)

  Reference: the elastic deformation is that of Simard et al., Best Practices
    for Convolutional Neural Networks Applied to Visual Document Analysis,
    ICDAR 2003, with its strength in voxels.
  """

  degrees: float = 20.0
  scale: float = 1.1
  flip: str = _AXES
  elastic: float = 2.0
  sigma: float = 10.0
  intensity: float = 0.1
  gamma: float = 1.0

  def __post_init__(self):
    ranges = {
      "degrees": (0, 180),
      "scale": (1, 2),
      "sigma": (1, math.inf),
      "elastic": (0, self.sigma / 4),
      "intensity": (0, 1),
      "gamma": (1, 10),
    }
    for name, (low, high) in ranges.items():
      value = getattr(self, name)
      if not low <= value <= high or math.isinf(value):
        why = ", a quarter of sigma, or it folds" if name == "elastic" else ""
        raise ValueError(
          f"{name} is {value}; it must lie in [{low}, {high:.4g}]{why}"
        )
    if sorted(self.flip) != sorted(set(self.flip) & set(_AXES)):
      raise ValueError(
        f"flip is {self.flip!r}; it must hold some of {_AXES!r}, each once"
      )

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """The example, changed; a function of its arrays and of the generator."""
    image, label = _check(example)
    place, bend, turn, contrast, tone = rng.spawn(5)
    at = self._places(image.shape[:3], place, bend)
    if at is not None:
      image = trilinear(image, at)
      label = None if label is None else nearest(label, at)
    # Drawn for all axes, so that one's draw doesn't hang on the others.
    turned = dict(zip(_AXES, turn.random(3) < 0.5, strict=True))
    axes = tuple(i for i, a in enumerate(_AXES) if a in self.flip and turned[a])
    image = np.flip(image, axes)
    label = None if label is None else np.flip(label, axes)
    if self.gamma > 1:
      image = _power(
        image, self.gamma ** contrast.uniform(-1, 1, image.shape[3])
      )
    if self.intensity:
      factor, summand = tone.uniform(-1, 1, (2, image.shape[3]))
      image = _linear(
        image, 1 + self.intensity * factor, self.intensity * summand
      )
    changed = {"image": image} | ({} if label is None else {"label": label})
    return {**example, **changed}

  def _places(
    self,
    shape: tuple[int, int, int],
    place: np.random.Generator,
    bend: np.random.Generator,
  ) -> np.ndarray | None:
    """Where each voxel's value comes from, [3 z y x]; None for there."""
    axis, (angle, size) = place.normal(size=3), place.uniform(-1, 1, 2)
    if not (self.degrees or self.scale > 1 or self.elastic):
      return None
    turn = rotation(axis, math.radians(self.degrees) * angle)
    at = affine(shape, self.scale**size * turn)
    if self.elastic:
      strength = np.float32(self.elastic * bend.uniform())
      at += strength * smooth_noise(shape, bend, sigma=self.sigma)
    return at


def rotation(
  axis: Float[np.ndarray, "3"], angle: float
) -> Float[np.ndarray, "3 3"]:
  """The matrix that turns places (z, y, x) about an axis.

  Args:
    axis: its direction (z, y, x), of any length but 0.
    angle: in radians; from y to x for the axis z, and so on in a circle.

  Example:
    >>> turn = rotation(np.array([1.0, 0, 0]), np.pi / 2)
    >>> (turn @ [5, 1, 0]).round(6).tolist()
    [5.0, 0.0, 1.0]
  """
  a, b, c = axis / np.linalg.norm(axis)
  cross = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])
  # Rodrigues: I + sin K + (1 - cos) K^2.
  turned = math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
  return np.eye(3) + turned


def affine(
  shape: tuple[int, int, int], matrix: Float[np.ndarray, "3 3"]
) -> Float32[np.ndarray, "3 z y x"]:
  """centre + matrix (place - centre) of every voxel, about the box's centre.

  Example:
    >>> affine((1, 1, 3), 2 * np.eye(3))[2].tolist()
    [[[-1.0, 1.0, 3.0]]]
  """
  matrix = matrix.astype(np.float32)
  axes = [np.arange(n, dtype=np.float32) - (n - 1) / 2 for n in shape]
  z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
  rows = [
    (row[0] * z + (n - 1) / 2) + row[1] * y + row[2] * x
    for row, n in zip(matrix, shape, strict=True)
  ]
  return np.stack(rows)


def smooth_noise(
  shape: tuple[int, int, int], rng: np.random.Generator, *, sigma: float
) -> Float32[np.ndarray, "3 z y x"]:
  """Three fields of standard deviation 1, white noise under a Gaussian.

  The noise lies sigma apart, which a Gaussian that wide doesn't show; the sum
  over it is a matrix product an axis.

  Args:
    shape: of a field.
    rng: where the noise is drawn from.
    sigma: standard deviation of the Gaussian, in voxels.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> field = smooth_noise((8, 8, 8), rng, sigma=4.0)
    >>> field.shape, bool(np.abs(np.diff(field)).max() < 0.5)
    ((3, 8, 8, 8), True)
  """
  kernels = []
  for n in shape:
    count = math.ceil((n - 1) / sigma) + 2 * _REACH + 1
    knots = (np.arange(count) - _REACH) * sigma
    far = (np.arange(n)[:, None] - knots) / sigma
    kernel = np.exp(-(far**2) / 2)
    kernel /= np.linalg.norm(kernel, axis=1, keepdims=True)
    kernels.append(kernel.astype(np.float32))
  z, y, x = kernels
  counts = [kernel.shape[1] for kernel in kernels]
  noise = rng.standard_normal((3, *counts), np.float32)
  # Not matmul: BLAS's threads would fight with the loader's over the cores.
  rows = np.einsum("xi,nkji->nkjx", x, noise)
  planes = np.einsum("yj,nkjx->nkyx", y, rows)
  flat = planes.reshape(3, counts[0], -1)
  return np.einsum("zk,nkf->nzf", z, flat).reshape(3, *shape)


def _check(example: Example) -> tuple[np.ndarray, np.ndarray | None]:
  image, label = example.get("image"), example.get("label")
  if not (
    isinstance(image, np.ndarray)
    and image.ndim == 4
    and image.dtype == np.float32
  ):
    found = {name: np.shape(value) for name, value in example.items()}
    raise ValueError(
      f"the example has {found}; Augment3D needs image float32 [z y x c]"
    )
  if label is not None and label.shape != image.shape[:3]:
    raise ValueError(
      f"label has shape {label.shape}, image {image.shape}; a label for each"
      " voxel is needed"
    )
  return image, label


def _tissue(image: np.ndarray) -> np.ndarray:
  """[z y x]: not 0 in all channels."""
  tissue = image[..., 0] != 0
  for channel in range(1, image.shape[3]):
    tissue |= image[..., channel] != 0
  return tissue


def _linear(
  image: np.ndarray, factor: np.ndarray, summand: np.ndarray
) -> np.ndarray:
  changed = image * factor.astype(np.float32)
  changed += _tissue(image)[..., None] * summand.astype(np.float32)
  return changed


def _power(image: np.ndarray, exponent: np.ndarray) -> np.ndarray:
  """Each channel's tissue, scaled to [0, 1] and back, to its power."""
  tissue, image = _tissue(image), image.copy()
  inside = image[tissue]
  if inside.size:
    low = inside.min(axis=0)
    spread = inside.max(axis=0) - low
    unit = (inside - low) / np.where(spread > 0, spread, 1)
    image[tissue] = low + spread * unit ** exponent.astype(np.float32)
  return image
