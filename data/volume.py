"""Patches of volumes: a brain that ships with a package, and one's own."""

import dataclasses
import functools
import os
import pathlib

import numpy as np
from jaxtyping import UInt8

from isthmus.data import nifti, scan
from isthmus.data.folder import walk
from isthmus.data.package import package_file
from isthmus.data.patch import PatchSource, Size, box, check_size, cover, three
from isthmus.data.source import check_split
from isthmus.data.text import check_fraction, is_held_out

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
    check_size(self.size, self.stride)
    check_fraction(self.eval_fraction)
    if not 0 <= self.foreground <= 1:
      raise ValueError(
        f"foreground is {self.foreground}; it must lie in [0, 1]"
      )

  def open(self, split: str) -> PatchSource:
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
    size = three(self.size)
    corners = cover(
      image.shape, size, stride=self.stride, name=f"split {split!r}"
    )
    shares = [(label[box(c, size)] > 0).mean() for c in corners.tolist()]
    corners = corners[np.asarray(shares) >= self.foreground]
    if not len(corners):
      raise ValueError(
        f"split {split!r} has 0 patches of {size} voxels with a foreground of"
        f" {self.foreground}; the largest is {max(shares):.3g}"
      )
    rows = np.insert(corners, 0, 0, axis=1)
    volume = image[..., None], label
    return PatchSource(lambda _: volume, rows, size, scale=1 / 255)


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
    size: voxels along z, y and x of a patch, one number for all or three;
      None for the whole.
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
  size: Size | None
  stride: int | None = None
  normalize: bool = True
  eval_fraction: float = 0.1
  eval_path: str | os.PathLike | None = None
  keep: int = 4
  max_bytes: int = 2**32

  def __post_init__(self):
    check_size(self.size, self.stride)
    check_fraction(self.eval_fraction)
    if self.keep < 1:
      raise ValueError(f"keep is {self.keep}; it must be at least 1")

  def open(self, split: str) -> PatchSource:
    """Examples of "train" or "eval"; see the class."""
    check_split(split)
    nifti.require()
    separate, held_out = self.eval_path is not None, split == "eval"
    root = self.eval_path if separate and held_out else self.path
    assert root is not None
    pairs, rows = [], []
    for name, image, label in self._pairs(root):
      if separate or is_held_out(name, self.eval_fraction) == held_out:
        paths = [path for path in (image, label) if path is not None]
        shape = scan.read_shape(paths, max_bytes=self.max_bytes)
        corners = cover(
          shape, self.size, stride=self.stride, name=repr(os.fspath(image))
        )
        rows.append(np.insert(corners, 0, len(pairs), axis=1))
        pairs.append((image, label))
    if not pairs:
      raise FileNotFoundError(
        f"split {split!r} has 0 volumes of {os.fspath(root)!r}; set eval_path,"
        f" or another eval_fraction than {self.eval_fraction}"
      )
    load = functools.lru_cache(self.keep)(lambda i: self._load(*pairs[i]))
    size = None if self.size is None else three(self.size)
    return PatchSource(load, np.concatenate(rows), size)

  def _pairs(
    self, root: str | os.PathLike
  ) -> list[tuple[str, pathlib.Path, pathlib.Path | None]]:
    """(name, image, label) of the volumes, sorted by name."""
    folder = pathlib.Path(root).expanduser()
    found = []
    for image in sorted(walk(root)):
      if not image.name.endswith(self.image):
        continue
      if self.label and image.name.endswith(self.label):
        continue  # where the label's suffix ends in the image's
      stem = image.name.removesuffix(self.image)
      label = image.with_name(stem + self.label) if self.label else None
      if label is not None and not label.is_file():
        raise ValueError(
          f"{os.fspath(image)!r} has no label {label.name!r} beside it"
        )
      name = image.with_name(stem).relative_to(folder).as_posix()
      found.append((name, image, label))
    if not found:
      raise FileNotFoundError(
        f"no file *{self.image} in {os.fspath(root)!r}; image= names the"
        " images' suffix"
      )
    return found

  def _load(
    self, image: pathlib.Path, label: pathlib.Path | None
  ) -> tuple[np.ndarray, np.ndarray | None]:
    volume = scan.read_image(image, max_bytes=self.max_bytes)
    data = volume.data
    if self.normalize:
      spread = float(data.std(dtype=np.float64))
      data = (data - np.float32(data.mean(dtype=np.float64))) / (spread or 1.0)
    if label is None:
      return data.T[..., None], None
    segments = scan.read_label(label, max_bytes=self.max_bytes)
    scan.check_place(label, segments, like=image, other=volume)
    return data.T[..., None], segments.data.T


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
