"""Bounded streams: what is read is what was promised."""

import gzip
import io

import pytest

from isthmus.data.bounded import open_packed, read_last


@pytest.mark.parametrize("packed", [False, True])
def test_files_are_opened_by_content(tmp_path, packed):
  path = tmp_path / "x"  # no suffix to go by
  path.write_bytes(gzip.compress(b"abcdef") if packed else b"abcdef")
  with open_packed(path) as bounded:
    assert bounded.packed == packed
    assert bounded.file.read(2) == b"ab"
    assert read_last(bounded.file, 4, (4,)).tobytes() == b"cdef"


def test_sizes_that_cannot_be_are_refused_by_the_length_alone(tmp_path):
  path = tmp_path / "x"
  path.write_bytes(b"abcdef")
  with open_packed(path) as bounded:
    bounded.check(6, (6,), 6)
    for size in (5, 7):
      with pytest.raises(ValueError, match=f"takes {size} bytes, it holds 6"):
        bounded.check(size, (size,), 100)
    with pytest.raises(ValueError, match="takes 6 bytes, max_bytes is 5"):
      bounded.check(6, (6,), 5)
  zeros = gzip.compress(bytes(10**6))
  path.write_bytes(zeros)
  with open_packed(path) as bounded:
    # Nothing unpacks to more than this bound, which zeros come close to.
    assert 10**6 <= bounded.length <= 2 * 10**6
    bounded.check(10**6, (10**6,), 2**30)
    with pytest.raises(ValueError, match=f"holds at most {bounded.length}"):
      bounded.check(bounded.length + 1, (1,), 2**30)


def test_streams_of_another_length_are_refused():
  with pytest.raises(ValueError, match=r"\(2, 2\) takes 4 bytes .* has 3"):
    read_last(io.BytesIO(b"abc"), 4, (2, 2))
  with pytest.raises(ValueError, match=r"\(2,\) takes 2 bytes .* has more"):
    read_last(io.BytesIO(b"abc"), 2, (2,))
  assert read_last(io.BytesIO(b""), 0, (0,)).size == 0
