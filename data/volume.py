"""Patches of volumes: a brain that ships with a package, and one's own."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, UInt8

from isthmus.data import nifti
from isthmus.data.package import package_file
from isthmus.data.source import Example, check_split
from isthmus.data.text import check_fraction, is_held_out

Size = int | tuple[int, int, int]
# Volume number -> image [z, y, x] and label [z, y, x], or None without one.
_Load = Callable[[int], tuple[np.ndarray, np.ndarray | None]]
_TEMPLATE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


@dataclasses.dataclass(frozen=True)
class BrainVolume:
  """Patches of the MNI152 brain, an average of 152 heads at 1 mm.

  An example holds image float32 [z, y, x, 1], the T1-weighted intensity in
  [0, 1], and label int32 [z, y, x]: 0 background, 1 grey and 2 white matter.
  A voxel gets the tissue whose map is the larger one if that is at least one
  half, and grey where both are equal.

  It is one head, so the split is by place: the front of it (large y) is held
  out, and no patch crosses the border. The halves of this template mirror
  each other exactly; to hold out one of them would hold out nothing.

  Args:
    size: voxels along z, y and x of a patch, one number for all or three.
    stride: voxels from a patch to the next; None means the size.
    foreground: share of a patch's voxels that are grey or white at least;
      patches with less are left out.
    eval_fraction: share of the volume, along y, that is held out.

  Raises:
    ValueError: a size or stride below 1, fractions outside [0, 1]; when
      opened, a patch larger than the split, or no patch with that much
      foreground.
    ImportError: when opened, where nilearn or nibabel is missing.

  Example:
    >>> BrainVolume(size=24).open("train")[0]["image"].shape
    (24, 24, 24, 1)

  Reference:
    Fonov et al., Unbiased Average Age-Appropriate Atlases for Pediatric
    Studies, NeuroImage 54(1), 2011.
  """

  _: dataclasses.KW_ONLY
  size: Size = 32
  stride: int | None = None
  foreground: float = 0.1
  eval_fraction: float = 0.25

  def __post_init__(self):
    _check_size(self.size, self.stride)
    check_fraction(self.eval_fraction)
    if not 0 <= self.foreground <= 1:
      raise ValueError(
        f"foreground is {self.foreground}; it must lie in [0, 1]"
      )

  def open(self, split: str) -> "PatchSource":
    """Examples of "train" or "eval"; see the class."""
    check_split(split)
    paths = tuple(
      package_file(
        "nilearn", _TEMPLATE.format(name), name="BrainVolume", extra="volume"
      )
      for name in ("t1", "gm", "wm")
    )
    image, label = _brain(*paths)
    border = round(image.shape[1] * (1 - self.eval_fraction))
    place = slice(border, None) if split == "eval" else slice(None, border)
    image, label = image[:, place], label[:, place]
    size = _three(self.size)
    corners = _corners(image.shape, size, self.stride, f"split {split!r}")
    shares = [(label[_box(c, size)] > 0).mean() for c in corners]
    corners = corners[np.asarray(shares) >= self.foreground]
    if not len(corners):
      raise ValueError(
        f"split {split!r} has 0 patches of {size} voxels with a foreground of"
        f" {self.foreground}; the largest is {max(shares):.3g}"
      )
    rows = np.insert(corners, 0, 0, axis=1)
    return PatchSource(lambda _: (image, label), rows, size, scale=1 / 255)


@dataclasses.dataclass(frozen=True)
class NiftiFolder:
  """Patches of the NIfTI volumes in a folder.

  An example holds image float32 [z, y, x, 1] and, where label is given,
  label int32 [z, y, x]. A volume with image and label is a pair of files
  that differ in their suffix, e.g. sub1_t1.nii.gz and sub1_seg.nii.gz.

  Args:
    path: the folder; its sub-folders are searched too.
    image: suffix of the images' file names.
    label: suffix of the labels', or None.
    size: voxels along z, y and x of a patch, one number for all or three.
    stride: voxels from a patch to the next; None means the size. The last
      patch along an axis ends with the volume.
    normalize: subtract a volume's mean and divide by its standard deviation.
    eval_fraction: share of the volumes that is held out, by a hash of their
      names.
    eval_path: a folder that holds the eval split instead; eval_fraction is
      then not used.
    keep: volumes kept in memory.
    max_bytes: the most that a volume may take.

  Raises:
    ValueError: a size, stride or keep below 1, eval_fraction outside [0, 1];
      when opened, a damaged header, a volume that is not 3-d or smaller than
      a patch, an image without a label or of another shape, a link out of
      the folder; when read, a damaged volume, labels that are not whole
      numbers or lie elsewhere in space, voxels that are not finite.
    FileNotFoundError: when opened, no such folder, or no image in it.
    ImportError: when opened, where nibabel is missing.

  Example:
    >>> nibabel = nifti.require()
    >>> image = nibabel.Nifti1Image(np.ones((8, 8, 9), np.int16), np.eye(4))
    >>> nibabel.save(image, "a.nii.gz")
    >>> source = NiftiFolder(".", size=8, eval_fraction=0.0).open("train")
    >>> len(source), source[0]["image"].shape
    (2, (8, 8, 8, 1))
  """

  path: str | os.PathLike
  _: dataclasses.KW_ONLY
  image: str = ".nii.gz"
  label: str | None = None
  size: Size
  stride: int | None = None
  normalize: bool = True
  eval_fraction: float = 0.1
  eval_path: str | os.PathLike | None = None
  keep: int = 4
  max_bytes: int = 2**32

  def __post_init__(self):
    _check_size(self.size, self.stride)
    check_fraction(self.eval_fraction)
    if self.keep < 1:
      raise ValueError(f"keep is {self.keep}; it must be at least 1")

  def open(self, split: str) -> "PatchSource":
    """Examples of "train" or "eval"; see the class."""
    check_split(split)
    nifti.require()
    separate, held_out = self.eval_path is not None, split == "eval"
    root = self.eval_path if separate and held_out else self.path
    assert root is not None
    pairs, rows = [], []
    for name, image, label in self._pairs(root):
      if separate or is_held_out(name, self.eval_fraction) == held_out:
        shape = self._shape(image, label)
        corners = _corners(
          shape, _three(self.size), self.stride, repr(os.fspath(image))
        )
        rows.append(np.insert(corners, 0, len(pairs), axis=1))
        pairs.append((image, label))
    if not pairs:
      raise FileNotFoundError(
        f"split {split!r} has 0 volumes of {os.fspath(root)!r}; set eval_path,"
        f" or another eval_fraction than {self.eval_fraction}"
      )
    load = functools.lru_cache(self.keep)(lambda i: self._load(*pairs[i]))
    return PatchSource(load, np.concatenate(rows), _three(self.size))

  def _pairs(
    self, root: str | os.PathLike
  ) -> list[tuple[str, pathlib.Path, pathlib.Path | None]]:
    """(name, image, label) of the volumes, sorted by name."""
    folder = pathlib.Path(root).expanduser()
    if not folder.is_dir():
      raise FileNotFoundError(f"no folder {os.fspath(root)!r}")
    found = []
    for image in sorted(folder.rglob(f"*{self.image}")):
      if self.label and image.name.endswith(self.label):
        continue  # where the label's suffix ends in the image's
      stem = image.name.removesuffix(self.image)
      label = image.with_name(stem + self.label) if self.label else None
      for path in filter(None, (image, label)):
        if not path.is_file():
          raise ValueError(
            f"{os.fspath(image)!r} has no label {path.name!r} beside it"
          )
        if not path.resolve().is_relative_to(folder.resolve()):
          raise ValueError(
            f"{os.fspath(path)!r} links out of {os.fspath(root)!r}; copy the"
            " file into the folder"
          )
      name = image.with_name(stem).relative_to(folder).as_posix()
      found.append((name, image, label))
    if not found:
      raise FileNotFoundError(
        f"no file *{self.image} in {os.fspath(root)!r}; image= names the"
        " images' suffix"
      )
    return found

  def _shape(
    self, image: pathlib.Path, label: pathlib.Path | None
  ) -> tuple[int, ...]:
    """[z, y, x] of a volume, from the headers."""
    shapes = [
      nifti.read_layout(path, max_bytes=self.max_bytes).shape
      for path in (image, label)
      if path is not None
    ]
    if len(shapes[0]) != 3:
      raise ValueError(
        f"{os.fspath(image)!r} has shape {shapes[0]}; it must have 3 axes"
      )
    if shapes[0] != shapes[-1]:
      raise ValueError(
        f"{os.fspath(label or '')!r} has shape {shapes[-1]}, its image"
        f" {shapes[0]}"
      )
    return shapes[0][::-1]

  def _load(
    self, image: pathlib.Path, label: pathlib.Path | None
  ) -> tuple[np.ndarray, np.ndarray | None]:
    volume = nifti.read(image, max_bytes=self.max_bytes)
    data = volume.data.astype(np.float32)
    if bad := int((~np.isfinite(data)).sum()):
      raise ValueError(f"{os.fspath(image)!r} has {bad} voxels not finite")
    if self.normalize:
      spread = float(data.std(dtype=np.float64))
      data = (data - np.float32(data.mean(dtype=np.float64))) / (spread or 1.0)
    if label is None:
      return data.T, None
    segments = nifti.read(label, max_bytes=self.max_bytes)
    if not np.allclose(segments.affine, volume.affine, atol=1e-3):
      raise ValueError(
        f"{os.fspath(label)!r} lies elsewhere than its image: affines"
        f" {segments.affine.tolist()} and {volume.affine.tolist()}"
      )
    whole = segments.data.astype(np.int32)
    if not np.array_equal(whole, segments.data):
      raise ValueError(f"{os.fspath(label)!r} has labels that are not int32")
    return data.T, whole.T


@dataclasses.dataclass(frozen=True, eq=False)
class PatchSource:
  """Boxes cut out of volumes when they are asked for.

  Args:
    load: number of a volume -> image [z, y, x] and label [z, y, x] or None.
    rows: a patch's volume and first voxel (z, y, x).
    size: voxels along z, y, x.
    scale: what intensities are multiplied with.

  Example:
    >>> load = lambda i: (np.ones((4, 4, 4)), None)
    >>> source = PatchSource(load, np.array([[0, 1, 2, 0]]), (2, 2, 2))
    >>> source[0]["image"].shape
    (2, 2, 2, 1)
  """

  load: _Load
  rows: Int[np.ndarray, "n 4"]
  size: tuple[int, int, int]
  _: dataclasses.KW_ONLY
  scale: float = 1.0

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: int) -> Example:
    volume, *corner = self.rows[i].tolist()
    image, label = self.load(volume)
    box = _box(corner, self.size)
    cut = image[box].astype(np.float32) * np.float32(self.scale)
    example = {"image": cut[..., None]}
    if label is not None:
      example["label"] = label[box].astype(np.int32)
    return example


@functools.cache
def _brain(
  t1: pathlib.Path, grey: pathlib.Path, white: pathlib.Path
) -> tuple[UInt8[np.ndarray, "z y x"], UInt8[np.ndarray, "z y x"]]:
  """(intensity, tissue) of the template."""
  image, *maps = (nifti.read(path).data for path in (t1, grey, white))
  for path, data in zip((t1, grey, white), (image, *maps), strict=True):
    if data.dtype != np.uint8 or data.shape != image.shape:
      raise ValueError(
        f"{os.fspath(path)!r} holds {data.dtype} {data.shape}, not uint8"
        f" {image.shape}: pip install --force-reinstall --no-deps nilearn"
      )
  # 1 where grey is the larger or both are equal, 2 where white is.
  tissue = 1 + np.argmax(np.stack(maps), axis=0)
  label = np.where(np.maximum(*maps) >= 128, tissue, 0).astype(np.uint8)
  for array in (image, label):
    array.setflags(write=False)
  return image.T, label.T


def _corners(
  shape: tuple[int, ...], size: tuple[int, ...], stride: int | None, name: str
) -> Int[np.ndarray, "n 3"]:
  """First voxels of boxes that cover a volume."""
  if any(n < s for n, s in zip(shape, size, strict=True)):
    raise ValueError(f"{name} has {shape} voxels (z, y, x), a patch {size}")
  axes = []
  for n, s in zip(shape, size, strict=True):
    begins = np.arange(0, n - s + 1, stride or s)
    axes.append(np.union1d(begins, [n - s]))
  return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def _box(corner: np.ndarray | list[int], size: tuple[int, ...]):
  return tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))


def _three(size: Size) -> tuple[int, int, int]:
  return (size, size, size) if isinstance(size, int) else size


def _check_size(size: Size, stride: int | None) -> None:
  if len(_three(size)) != 3 or min(_three(size)) < 1:
    raise ValueError(f"size is {size}; it must be 1 or 3 numbers of at least 1")
  if stride is not None and stride < 1:
    raise ValueError(f"stride is {stride}; it must be at least 1")
