"""NIfTI-1 volumes, their headers checked before nibabel sees them."""

import math
import os
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from isthmus.data.bounded import Bounded, open_packed, read_last

_HEADER = 348
# datatype code -> numpy's name; the others are colours, complex or 128 bits.
_TYPES = {
  2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2",
  768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip


class Volume(NamedTuple):
  """A volume and where it lies.

  Attributes:
    data: [x, y, z] or [x, y, z, ...], in the order of the file: numbers as
      stored, or float64 where the header scales them.
    spacing: [3] size of a voxel along x, y, z, in the file's unit (mm).
    affine: [4, 4] from voxel indices to the scanner's or template's space.

  Example:
    >>> volume = Volume(np.zeros((4, 5, 6)), np.ones(3), np.eye(4))
    >>> volume.affine @ [1, 2, 3, 1]
    array([1., 2., 3., 1.])
  """

  data: np.ndarray
  spacing: Float64[np.ndarray, "3"]
  affine: Float64[np.ndarray, "4 4"]


class Layout(NamedTuple):
  """What a header says of the voxels.

  Attributes:
    shape: three sizes or more.
    dtype: of the stored numbers, in the file's byte order.
    begin: byte at which the voxels begin.

  Example:
    >>> Layout((4, 5, 6), np.dtype("<i2"), 352).size
    240
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  begin: int

  @property
  def size(self) -> int:
    """Bytes of the voxels."""
    return math.prod(self.shape) * self.dtype.itemsize


def read(path: str | os.PathLike, *, max_bytes: int = 2**32) -> Volume:
  """The volume of a .nii or .nii.gz file.

  Sizes, types and positions in the header are checked against the length of
  the file before memory is taken; of a gzipped file no more is unpacked than
  its header asks for, and its checksum is compared.

  Args:
    path: the file; gzip is recognised by its content, not by its name.
    max_bytes: the most that it may take unpacked.

  Raises:
    ImportError: where nibabel is missing.
    FileNotFoundError: no such file.
    ValueError: damaged, not NIfTI-1, more or fewer voxels than the header
      says, colours or complex numbers, an affine that is not finite.

  Example:
    >>> ones, affine = np.ones((2, 3, 4), np.int16), np.diag([2, 2, 3, 1])
    >>> nibabel = require()
    >>> nibabel.save(nibabel.Nifti1Image(ones, affine), "x.nii.gz")
    >>> volume = read("x.nii.gz")
    >>> volume.data.shape, volume.spacing.tolist()
    ((2, 3, 4), [2.0, 2.0, 3.0])

  Reference:
    Cox et al., A (Sort of) New Image Data Format Standard: NIfTI-1, Human
    Brain Mapping, 2004.
  """
  nibabel = require()
  try:
    with open_packed(path) as bounded:
      begin, layout = _layout(bounded, max_bytes)
      rest = layout.begin + layout.size - len(begin)
      content = begin + read_last(bounded.file, rest, layout.shape).tobytes()
    image = nibabel.Nifti1Image.from_bytes(content)
    data = np.asanyarray(image.dataobj)
    spacing = np.asarray(image.header.get_zooms()[:3], np.float64)
    affine = np.asarray(image.affine, np.float64)
    if data.shape != layout.shape:
      raise ValueError(f"its shape is {layout.shape}, nibabel's {data.shape}")
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 0):
      raise ValueError("its affine is singular or not finite")
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
      raise ValueError(f"its spacing is {spacing.tolist()}")
  except FileNotFoundError:
    raise
  except Exception as error:  # nibabel raises many kinds
    raise _refused(path, error) from error
  data = data.astype(data.dtype.newbyteorder("="), copy=False)
  return Volume(data, spacing, affine)


def read_layout(path: str | os.PathLike, *, max_bytes: int = 2**32) -> Layout:
  """Shape and type of a volume, from its header alone; see `read`.

  Example:
    >>> nibabel = require()
    >>> image = nibabel.Nifti1Image(np.ones((2, 3, 4), np.int16), np.eye(4))
    >>> nibabel.save(image, "x.nii")
    >>> read_layout("x.nii").shape
    (2, 3, 4)
  """
  try:
    with open_packed(path) as bounded:
      return _layout(bounded, max_bytes)[1]
  except FileNotFoundError:
    raise
  except (EOFError, OSError, ValueError, zlib.error) as error:
    raise _refused(path, error) from error


def _layout(bounded: Bounded, max_bytes: int) -> tuple[bytes, Layout]:
  """(the header's bytes, what they say), checked against the file's length."""
  header = bounded.file.read(_HEADER)
  if len(header) < _HEADER:
    raise ValueError(f"it has {len(header)} of a header's {_HEADER} bytes")
  for order in "<>":
    if struct.unpack_from(f"{order}i", header)[0] == _HEADER:
      break
  else:
    raise ValueError(f"it begins with {header[:4].hex()}, not with 348")
  if header[344:348] != b"n+1\0":
    raise ValueError(
      f"its magic is {header[344:348]!r}, not b'n+1\\x00'; convert it to a"
      " single-file NIfTI-1"
    )
  rank, *dims = struct.unpack_from(f"{order}8h", header, 40)
  if not 3 <= rank <= 7:
    raise ValueError(f"its rank is {rank}, outside [3, 7]")
  shape = tuple(dims[:rank])
  if min(shape) < 1:
    raise ValueError(f"its shape is {shape}")
  code, bits = struct.unpack_from(f"{order}2h", header, 70)
  if code not in _TYPES:
    raise ValueError(
      f"its datatype is {code}; those of real numbers are {sorted(_TYPES)}"
    )
  dtype = np.dtype(order + _TYPES[code])
  if bits != dtype.itemsize * 8:
    raise ValueError(f"its datatype {code} has {bits} bits, not {dtype}'s")
  begin = struct.unpack_from(f"{order}f", header, 108)[0]
  if not (begin.is_integer() and _HEADER + 4 <= begin <= 2**24):
    raise ValueError(f"its voxels begin at byte {begin}, not in [352, 2^24]")
  slope, offset = struct.unpack_from(f"{order}2f", header, 112)
  # No number stands for no scaling, as 0 does.
  scaled = slope != 0 and not math.isnan(slope)
  if scaled and not (math.isfinite(slope) and math.isfinite(offset)):
    raise ValueError(f"its slope and offset are {slope} and {offset}")
  layout = Layout(shape, dtype, int(begin))
  bounded.check(layout.begin + layout.size, shape, max_bytes)
  return header, layout


def _refused(path: str | os.PathLike, error: Exception) -> ValueError:
  cause = " ".join(str(error).split()) or type(error).__name__
  return ValueError(
    f"{os.fspath(path)!r} is not read as NIfTI-1: {cause}; get or convert it"
    " again"
  )


def require() -> Any:
  """nibabel, or an ImportError that names the extra.

  Example:
    >>> require().__name__
    'nibabel'
  """
  try:
    import nibabel
  except ImportError as error:
    raise ImportError(
      "NIfTI needs the package nibabel: pip install 'isthmus[volume]'"
    ) from error
  return nibabel
