"""Scans that belong together: NIfTI files of one shape and one place."""

import os
from collections.abc import Sequence

import numpy as np

from isthmus.data import nifti


def read_shape(
  paths: Sequence[str | os.PathLike], *, max_bytes: int = 2**32
) -> tuple[int, int, int]:
  """Voxels along z, y, x that files have in common, from their headers.

  Raises:
    ValueError: a damaged header, not 3 axes, shapes that differ.

  Example:
    >>> nibabel = nifti.require()
    >>> image = nibabel.Nifti1Image(np.ones((2, 3, 4), np.int16), np.eye(4))
    >>> nibabel.save(image, "x.nii")
    >>> read_shape(["x.nii"])
    (4, 3, 2)
  """
  shapes = [nifti.read_layout(p, max_bytes=max_bytes).shape for p in paths]
  if len(shapes[0]) != 3:
    raise ValueError(
      f"{os.fspath(paths[0])!r} has shape {shapes[0]}; it must have 3 axes"
    )
  for path, shape in zip(paths, shapes, strict=True):
    if shape != shapes[0]:
      raise ValueError(
        f"{os.fspath(path)!r} has shape {shape}, {_name(paths[0])!r} has"
        f" {shapes[0]}; resample one to the other"
      )
  x, y, z = shapes[0]
  return z, y, x


def read_image(
  path: str | os.PathLike, *, max_bytes: int = 2**32
) -> nifti.Volume:
  """A volume of finite intensities; its data is float32 [x, y, z].

  Raises:
    ValueError: see `nifti.read`; voxels that are not finite.

  Example:
    >>> nibabel = nifti.require()
    >>> image = nibabel.Nifti1Image(np.ones((2, 3, 4), np.int16), np.eye(4))
    >>> nibabel.save(image, "x.nii")
    >>> read_image("x.nii").data.dtype
    dtype('float32')
  """
  volume = nifti.read(path, max_bytes=max_bytes)
  with np.errstate(over="ignore"):  # of float64: counted below
    data = volume.data.astype(np.float32, copy=False)
  if bad := int(data.size - np.isfinite(data).sum()):
    raise ValueError(f"{os.fspath(path)!r} has {bad} voxels not finite")
  return volume._replace(data=data)


def read_label(
  path: str | os.PathLike, *, max_bytes: int = 2**32
) -> nifti.Volume:
  """A volume of whole numbers; its data is int32 [x, y, z].

  Raises:
    ValueError: see `nifti.read`; numbers that int32 doesn't hold.

  Example:
    >>> nibabel = nifti.require()
    >>> label = np.ones((2, 3, 4), np.float32)
    >>> nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), "x.nii")
    >>> read_label("x.nii").data.dtype
    dtype('int32')
  """
  volume = nifti.read(path, max_bytes=max_bytes)
  with np.errstate(invalid="ignore"):  # compared below
    whole = volume.data.astype(np.int32, copy=False)
  if not np.array_equal(whole, volume.data):
    raise ValueError(f"{os.fspath(path)!r} has labels that are not int32")
  return volume._replace(data=whole)


def check_place(
  path: str | os.PathLike,
  volume: nifti.Volume,
  *,
  like: str | os.PathLike,
  other: nifti.Volume,
) -> None:
  """Raises ValueError where two volumes lie in different places.

  Args:
    path: of the volume, for the error.
    volume: what was read from it.
    like: path of the one that it is compared with.
    other: what was read from that.

  Example:
    >>> here = nifti.Volume(np.zeros((1, 1, 1)), np.ones(3), np.eye(4))
    >>> there = here._replace(affine=np.diag([-1.0, 1, 1, 1]))
    >>> check_place("a.nii", there, like="b.nii", other=here)
    Traceback (most recent call last):
    ValueError: 'a.nii' lies elsewhere than 'b.nii': affines [[-1.0, ...
  """
  if not np.allclose(volume.affine, other.affine, atol=1e-3):
    raise ValueError(
      f"{os.fspath(path)!r} lies elsewhere than {_name(like)!r}: affines"
      f" {volume.affine.tolist()} and {other.affine.tolist()}; resample one to"
      " the other"
    )


def _name(path: str | os.PathLike) -> str:
  return os.path.basename(os.fspath(path))
