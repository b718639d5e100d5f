"""Zip directories: whole, counted, and of what can be read within bounds."""

import io
import zipfile

import pytest

from isthmus.data.zipped import open_zip


def pack(count=3, compression=zipfile.ZIP_DEFLATED):
  raw = io.BytesIO()
  with zipfile.ZipFile(raw, "w", compression) as file:
    for i in range(count):
      file.writestr(f"{i}.txt", str(i) * 50)
  return bytearray(raw.getvalue())


def names(content):
  with open_zip(io.BytesIO(content)) as file:
    return file.namelist()


def test_whole_files_open():
  assert names(pack(0)) == []
  assert names(pack()) == ["0.txt", "1.txt", "2.txt"]
  with_comment = io.BytesIO(pack())
  with zipfile.ZipFile(with_comment, "a") as file:
    file.comment = b"x" * 5000
  assert len(names(with_comment.getvalue())) == 3


def test_members_swallowed_by_the_one_before_are_missed():
  """A comment's length, made longer, hides what follows; zipfile reads on."""
  content = pack()
  first = content.index(b"PK\1\2")
  second = content.index(b"PK\1\2", first + 4)
  content[first + 32 : first + 34] = (second - first).to_bytes(2, "little")
  with zipfile.ZipFile(io.BytesIO(content)) as file:
    assert len(file.namelist()) == 2
  with pytest.raises(ValueError, match="lists 2 members, its end counts 3"):
    names(content)


def test_more_members_than_fit_the_old_record():
  many = pack(2**16 + 1, zipfile.ZIP_STORED)
  assert len(names(many)) == 2**16 + 1
  at = many.rindex(b"PK\6\6")
  many[at + 32 : at + 34] = b"\0\0"
  with pytest.raises(ValueError, match="lists 65537 members, its end .* 65536"):
    names(many)
  many[many.rindex(b"PK\6\7") + 8] ^= 1
  with pytest.raises(zipfile.BadZipFile, match="."):
    names(many)


@pytest.mark.parametrize(
  "place, value, cause",
  [
    (8, 1, "'0.txt' is encrypted"),
    (10, 12, "'0.txt' has compression 12; only stored"),
    (10, 14, "'0.txt' has compression 14; only stored"),
    (47, 0, r"the name '0\\x00txt' is not plain"),
  ],
)
def test_members_that_are_not_read(place, value, cause):
  content = pack()
  content[content.index(b"PK\1\2") + place] = value
  with pytest.raises(ValueError, match=cause):
    names(content)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"no zip" * 100])
def test_what_is_no_zip_file(content):
  with pytest.raises(zipfile.BadZipFile, match="not a zip file"):
    names(content)
