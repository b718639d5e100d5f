"""IDX: every type and rank, gzip, and headers that lie."""

import gzip
import struct

import numpy as np
import pytest

from isthmus.data.idx import read_idx

CODES = {"u1": 8, "i1": 9, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array, shape=None, code=None):
  """The file's bytes, written from the format's description."""
  shape = array.shape if shape is None else shape
  big = array.astype(array.dtype.newbyteorder(">"))
  code = CODES[array.dtype.str[1:]] if code is None else code
  header = struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape)
  return header + big.tobytes()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", "<i4", "<f4", "<f8"])
def test_every_type_comes_back(tmp_path, dtype, packed):
  array = np.arange(-12, 12).astype(dtype).reshape(2, 3, 4)
  content = idx(array)
  path = tmp_path / "x"
  path.write_bytes(gzip.compress(content) if packed else content)
  found = read_idx(path)
  np.testing.assert_array_equal(found, array)
  assert found.dtype == array.dtype and found.dtype.isnative


def test_empty_array_and_high_rank(tmp_path):
  path = tmp_path / "x"
  for shape in ((0, 28, 28), (1,) * 32):
    path.write_bytes(idx(np.zeros(shape, np.uint8)))
    assert read_idx(path).shape == shape


SMALL = np.arange(6, dtype=np.uint8).reshape(2, 3)
LIES = {
  "one row more": (idx(SMALL, (3, 3)), r"\(3, 3\) takes"),
  "one row fewer": (idx(SMALL, (1, 3)), r"\(1, 3\)"),
  "four billion": (idx(SMALL, (2**32 - 1, 3)), "max_bytes is"),
  "product over 2^64": (idx(SMALL, (2**32 - 1,) * 4), "max_bytes is"),
  "trailing byte": (idx(SMALL) + b"\0", r"\(2, 3\)"),
  "item missing": (idx(SMALL)[:-1], r"\(2, 3\) takes"),
  "type unknown": (idx(SMALL, code=7), "begins with 00000702"),
  "rank 0": (b"\0\0\x08\0", "rank is 0"),
  "rank 255": (b"\0\0\x08\xff" + b"\1" * 1020, "rank is 255"),
  "header cut": (idx(SMALL)[:9], "ends within its header"),
  "empty": (b"", "ends within its header"),
  "text": (b"not an IDX file", "begins with 6e6f7420"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused(tmp_path, lie, packed):
  content, cause = LIES[lie]
  path = tmp_path / "lie.idx"
  path.write_bytes(gzip.compress(content) if packed else content)
  with pytest.raises(ValueError, match=f"lie.idx' is not a .*{cause}.*again"):
    read_idx(path)


def test_damaged_gzip_is_refused(tmp_path):
  path = tmp_path / "x.gz"
  whole = gzip.compress(idx(SMALL))
  for content in (whole[:-1], whole[:-8], whole[:20], whole[:-8] + b"\0" * 8):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.gz' is not a whole IDX file"):
      read_idx(path)


def test_memory_is_not_taken_for_what_cannot_be_there(tmp_path, monkeypatch):
  """3 GB claimed in 60 bytes of gzip: refused by the most gzip can give."""
  path = tmp_path / "x.gz"
  path.write_bytes(gzip.compress(idx(SMALL, (3 * 10**9,))))
  taken = []
  empty = np.empty
  monkeypatch.setattr(
    np, "empty", lambda n, *a: taken.append(n) or empty(n, *a)
  )
  with pytest.raises(ValueError, match="takes 3000000008 bytes, it holds at"):
    read_idx(path)
  assert not taken
  with pytest.raises(ValueError, match="takes 18 bytes, max_bytes is 17"):
    path.write_bytes(idx(SMALL))
    read_idx(path, max_bytes=17)


def test_missing_file_stays_a_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="absent"):
    read_idx(tmp_path / "absent")
