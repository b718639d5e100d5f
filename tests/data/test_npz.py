"""Npz: rows and splits; object arrays, lies and bombs refused unread."""

import io
import zipfile

import numpy as np
import pytest

from isthmus.data.npz import Npz, read_headers, read_npz


def npy(array, header=None):
  """Bytes of a .npy file, with a header of our choice."""
  out = io.BytesIO()
  if header is None:
    np.save(out, array, allow_pickle=True)
    return out.getvalue()
  text = repr(header).encode() + b"\n"
  magic = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little")
  return magic + text + array.tobytes()


def save(path, members, compression=zipfile.ZIP_DEFLATED):
  with zipfile.ZipFile(path, "w", compression) as file:
    for name, content in members:
      file.writestr(name, content)
  return path


@pytest.mark.parametrize("save_as", [np.savez, np.savez_compressed])
def test_arrays_come_back_as_numpy_reads_them(tmp_path, save_as):
  arrays = {
    "x": np.arange(24, dtype=np.float32).reshape(4, 3, 2),
    "fortran": np.asfortranarray(np.arange(12).reshape(4, 3)),
    "big": np.arange(4, dtype=">i2"),
    "inner/flag": np.array([True, False, True, True]),
    "name": np.array(["a", "bé", "c", "d"]),
    "void": np.zeros((4, 0)),
  }
  path = tmp_path / "x.npz"
  save_as(path, **arrays)
  found = read_npz(path)
  assert list(found) == list(arrays)
  for name, array in arrays.items():
    np.testing.assert_array_equal(found[name], array)
    assert found[name].dtype == array.dtype.newbyteorder("=")
    header = read_headers(path)[name]
    assert header.shape == array.shape and header.size == array.nbytes


def test_rows_are_split_once_and_for_all(tmp_path):
  path = tmp_path / "x.npz"
  np.savez(path, x=np.arange(50) * 2, y=np.arange(50))
  data = Npz(path, eval_fraction=0.2)
  train, held = data.open("train"), data.open("eval")
  assert (len(train), len(held)) == (40, 10)
  rows = [source[i] for source in (train, held) for i in range(len(source))]
  assert all(row["x"] == 2 * row["y"] for row in rows)
  assert sorted(int(row["y"]) for row in rows) == list(range(50))
  again = Npz(path, eval_fraction=0.2).open("eval")
  np.testing.assert_array_equal(again.arrays["y"], held.arrays["y"])


def test_separate_eval_file_must_have_the_same_fields(tmp_path):
  np.savez(tmp_path / "a.npz", x=np.zeros((6, 2)))
  np.savez(tmp_path / "b.npz", x=np.ones((3, 2)))
  data = Npz(tmp_path / "a.npz", eval_path=tmp_path / "b.npz")
  assert (len(data.open("train")), len(data.open("eval"))) == (6, 3)
  for wrong in ({"y": np.ones((3, 2))}, {"x": np.ones((3, 3))}):
    np.savez(tmp_path / "b.npz", **wrong)
    with pytest.raises(ValueError, match="field 'x' is .*b.npz.*a.npz"):
      data.open("eval")


class Bomb:
  """Leaves a mark when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, "w")


@pytest.mark.parametrize("structured", [False, True])
def test_object_arrays_are_refused_unopened(tmp_path, structured):
  mark = tmp_path / "unpickled"
  array = np.array([Bomb(str(mark))], object)
  if structured:
    array = np.zeros(1, [("n", "i4"), ("inner", [("o", "O")])])
    array["inner"]["o"][0] = Bomb(str(mark))
  path = save(tmp_path / "x.npz", [("x.npy", npy(array))])
  with pytest.raises(ValueError, match="x.npz' .*'x' .*runs code; save numb"):
    read_npz(path)
  assert not mark.exists()
  with np.load(path, allow_pickle=True) as file:  # the bomb is a live one
    assert file["x"] is not None and mark.exists()


def head(shape, descr="<i4", **more):
  return {"descr": descr, "fortran_order": False, "shape": shape, **more}


THREE = np.arange(3, dtype=np.int32)
LIES = {
  "more rows": (npy(THREE, head((4,))), "shape .4,. of int32, 16 .* 12 are"),
  "fewer rows": (npy(THREE, head((2,))), "8 bytes, but 12 are there"),
  "over 2^64": (npy(THREE, head((2**40, 2**40))), "12 are there"),
  "negative": (npy(THREE, head((-1, -3))), "shape"),
  "empty strings": (npy(THREE[:0], head((2**40,), "S0")), "dtype .S0"),
  "structured": (npy(np.zeros(2, "i4,i4")), "fields of a structured array"),
  "dates": (npy(np.zeros(2, "M8[s]")), "dtype datetime64"),
  "code": (npy(THREE, "__import__('os').getcwd()"), "bad header"),
  "extra key": (npy(THREE, head((3,), more=1)), "bad header"),
  "not npy": (b"PK\3\4 no array", "bad header"),
  "empty": (b"", "bad header"),
  "version 3": (b"\x93NUMPY\3\0" + npy(THREE)[8:], r"format \(3, 0\)"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused(tmp_path, lie):
  content, cause = LIES[lie]
  path = save(tmp_path / "lie.npz", [("x.npy", content)])
  with pytest.raises(ValueError, match=f"lie.npz' is not read .*'x'.*{cause}"):
    read_npz(path)


@pytest.mark.parametrize("name", ["../x.npy", "/x.npy", "C:x.npy", "a\\x.npy",
                                  "x.txt", "a//x.npy"])  # fmt: skip
def test_names_that_leave_or_mislead_are_refused(tmp_path, name):
  path = save(tmp_path / "x.npz", [(name, npy(THREE))])
  with pytest.raises(ValueError, match="x.npz' is not read as .npz: the [nm]"):
    read_npz(path)


def test_a_name_twice_is_refused(tmp_path):
  with pytest.warns(UserWarning, match="Duplicate name"):
    path = save(tmp_path / "x.npz", [("x.npy", npy(THREE))] * 2)
  with pytest.raises(ValueError, match="'x.npy' is there twice"):
    read_npz(path)


def test_bombs_are_refused(tmp_path):
  # An honest one, 2 MB in 2 kB: over the limit that the field names.
  zeros = np.zeros(2**18)
  path = save(tmp_path / "honest.npz", [("x.npy", npy(zeros))])
  assert path.stat().st_size < 2**12
  assert len(Npz(path).open("train")) > 0
  with pytest.raises(ValueError, match="honest.npz.* max_bytes is 100000"):
    Npz(path, max_bytes=10**5).open("train")
  # One whose directory claims less than its data unpack to, and one more.
  for claimed, cause in ((2**10, "CRC"), (2**31, "claims 2147483648")):
    content = bytearray(path.read_bytes())
    for magic, place in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
      begin = content.index(magic) + place
      content[begin : begin + 4] = claimed.to_bytes(4, "little")
    (tmp_path / "lying.npz").write_bytes(content)
    with pytest.raises(ValueError, match=f"lying.npz.*{cause}"):
      read_npz(tmp_path / "lying.npz")


def test_other_compressions_encryption_and_no_zip_are_refused(tmp_path):
  path = save(tmp_path / "x.npz", [("x.npy", npy(THREE))], zipfile.ZIP_BZIP2)
  with pytest.raises(ValueError, match="compression 12"):
    read_npz(path)
  (tmp_path / "x.npz").write_bytes(npy(THREE))
  with pytest.raises(ValueError, match="x.npz' is not read .* not a zip file"):
    read_npz(path)
  save(path, [])
  with pytest.raises(ValueError, match="no array"):
    read_npz(path)
  content = bytearray(save(path, [("x.npy", npy(THREE))]).read_bytes())
  content[content.index(b"PK\1\2") + 8] |= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match="encrypted"):
    read_npz(path)


def test_flipped_data_fail_their_checksum(tmp_path):
  path = save(tmp_path / "x.npz", [("x.npy", npy(THREE))], zipfile.ZIP_STORED)
  content = bytearray(path.read_bytes())
  content[content.index(THREE.tobytes()) + 4] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match="x.npz' is not read .*CRC"):
    read_npz(path)


def test_splits_and_fields_that_cannot_be(tmp_path):
  path = tmp_path / "x.npz"
  np.savez(path, x=np.zeros(4), y=np.zeros(3))
  with pytest.raises(ValueError, match="x.npz': field 'y' has 3 rows"):
    Npz(path).open("train")
  np.savez(path, x=np.zeros(4))
  with pytest.raises(ValueError, match="'eval' has 0 of the 4 rows"):
    Npz(path, eval_fraction=0.0).open("eval")
  with pytest.raises(ValueError, match="eval_fraction is 2"):
    Npz(path, eval_fraction=2)
  with pytest.raises(FileNotFoundError, match="absent"):
    Npz(tmp_path / "absent.npz").open("train")
