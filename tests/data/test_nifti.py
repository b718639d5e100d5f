"""NIfTI: values, scaling, byte orders; headers that lie are refused."""

import gzip
import struct
import sys

import numpy as np
import pytest

from isthmus.data import nifti

nibabel = pytest.importorskip("nibabel")

AFFINE = np.array(
  [[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3, 1], [0, 0, 0, 1]]
)


def content(array, affine=AFFINE, endianness="<"):
  header = nibabel.Nifti1Header(endianness=endianness)
  header.set_data_dtype(array.dtype)
  return bytearray(nibabel.Nifti1Image(array, affine, header).to_bytes())


@pytest.fixture
def write(tmp_path):
  def write(data, packed=False):
    path = tmp_path / "x.nii"
    path.write_bytes(gzip.compress(data) if packed else data)
    return path

  return write


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "f4", "f8"])
def test_every_type_comes_back(write, dtype, endianness, packed):
  array = np.arange(24).reshape(2, 3, 4).astype(dtype)
  path = write(content(array, endianness=endianness), packed)
  volume = nifti.read(path)
  np.testing.assert_array_equal(volume.data, array)
  assert volume.data.dtype == np.dtype(dtype)
  np.testing.assert_allclose(volume.affine, AFFINE)
  np.testing.assert_allclose(volume.spacing, [1.5, 2, 3])
  layout = nifti.read_layout(path)
  assert layout.shape == (2, 3, 4) and layout.size == array.nbytes


def test_slope_and_offset_are_applied(write):
  array = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
  data = content(array)
  struct.pack_into("<2f", data, 112, 0.5, -1)
  np.testing.assert_array_equal(nifti.read(write(data)).data, array * 0.5 - 1)
  for unset in (0.0, float("nan")):
    struct.pack_into("<2f", data, 112, unset, 3)
    np.testing.assert_array_equal(nifti.read(write(data)).data, array)


def test_extensions_and_four_axes(write, tmp_path):
  array = np.arange(16, dtype=np.int16).reshape(2, 2, 2, 2)
  image = nibabel.Nifti1Image(array, AFFINE)
  image.header.extensions.append(
    nibabel.nifti1.Nifti1Extension("comment", b"hello")
  )
  volume = nifti.read(write(image.to_bytes()))
  np.testing.assert_array_equal(volume.data, array)
  assert volume.spacing.shape == (3,)


ARRAY = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
LIES = {
  "size of header": ((0, "<i", 340), "begins with 54010000"),
  "rank 0": ((40, "<h", 0), "rank is 0"),
  "rank 8": ((40, "<h", 8), "rank is 8"),
  "more voxels": ((42, "<h", 3), r"\(3, 3, 4\) takes"),
  "fewer voxels": ((42, "<h", 1), r"\(1, 3, 4\) takes"),
  "negative": ((42, "<h", -2), r"shape is \(-2, 3, 4\)"),
  "huge": ((40, "<8h", 7, *[32767] * 7), "max_bytes is"),
  "datatype": ((70, "<h", 128), "datatype is 128"),
  "complex": ((70, "<2h", 32, 64), "datatype is 32"),
  "bits": ((72, "<h", 8), "datatype 4 has 8 bits"),
  "begin NaN": ((108, "<f", float("nan")), "begin at byte nan"),
  "begin in header": ((108, "<f", 100.0), "begin at byte 100.0"),
  "begin past end": ((108, "<f", 4096.0), "takes"),
  "begin far past": ((108, "<f", 1e30), r"begin at byte 1\.0"),
  "slope": ((112, "<2f", float("inf"), 0), "slope and offset are inf"),
  "offset": ((112, "<2f", 1.0, float("nan")), "slope and offset are 1.0"),
  "magic": ((344, "4s", b"ni1\0"), "single-file"),
  "affine": ((280, "<f", float("nan")), "affine"),
  "singular": ((280, "<4f", 0, 0, 0, 0), "affine is singular"),
  "spacing": ((80, "<f", float("nan")), "spacing|pixdim|affine"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused(write, lie, packed):
  (place, form, *values), cause = LIES[lie]
  data = content(ARRAY)
  struct.pack_into(form, data, place, *values)
  path = write(data, packed)
  with pytest.raises(
    ValueError, match=f"x.nii' is not read .*: .*{cause}"
  ) as e:
    nifti.read(path)
  assert "\n" not in str(e.value)


def test_cut_off_and_damaged_files_are_refused(write):
  data = content(ARRAY)
  for cut in (0, 100, 347, 350, len(data) - 1):
    for packed in (False, True):
      with pytest.raises(ValueError, match="x.nii' is not read as NIfTI-1: "):
        nifti.read(write(data[:cut], packed))
  whole = gzip.compress(data)
  path = write(b"")
  for damaged in (whole[:-1], whole[:40], whole[:-8] + bytes(8)):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="x.nii' is not read as NIfTI-1: "):
      nifti.read(path)
  with pytest.raises(ValueError, match="takes 400 bytes, max_bytes is 399"):
    nifti.read(write(data), max_bytes=399)
  with pytest.raises(FileNotFoundError, match="absent"):
    nifti.read(path.with_name("absent"))


def test_memory_is_not_taken_for_what_cannot_be_there(write, monkeypatch):
  data = content(ARRAY)
  struct.pack_into("<3h", data, 42, 1000, 1000, 1000)
  path, taken = write(data, packed=True), []
  monkeypatch.setattr(np, "empty", lambda *a: taken.append(a))
  for read in (nifti.read, nifti.read_layout):
    with pytest.raises(ValueError, match="takes 2000000352 bytes, it holds at"):
      read(path)
  assert not taken


def test_missing_package_names_the_extra(monkeypatch, write):
  monkeypatch.setitem(sys.modules, "nibabel", None)
  with pytest.raises(ImportError, match=r"pip install 'isthmus\[volume\]'"):
    nifti.read(write(content(ARRAY)))
