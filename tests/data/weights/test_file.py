"""Bounds, quotes and places."""

import os

import numpy as np
import pytest

from isthmus.data.weights.file import (
  Cursor,
  WeightsError,
  count,
  inside,
  map_bytes,
  quote,
)


def test_map_bytes(tmp_path):
  path = tmp_path / "x"
  path.write_bytes(b"abc")
  data = map_bytes(path)
  assert data.tobytes() == b"abc" and not data.flags.writeable
  assert type(data) is np.ndarray
  path.write_bytes(b"")
  with pytest.raises(WeightsError, match="empty"):
    map_bytes(path)
  with pytest.raises(FileNotFoundError, match="missing"):
    map_bytes(tmp_path / "missing")
  os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
  for other in (tmp_path, tmp_path / "pipe"):
    with pytest.raises(WeightsError, match="not a regular file"):
      map_bytes(other)


def test_cursor(tmp_path):
  data = np.frombuffer(b"\1\2\0\0\0\0abc", np.uint8)
  cursor = Cursor(tmp_path, data)
  assert cursor.number("B", "one") == 1
  assert cursor.number("I", "two") == 2  # unaligned, little-endian
  assert cursor.take(2, "rest") == b"\0a" and cursor.left == 2
  with pytest.raises(WeightsError, match="more takes 3 bytes at byte 7, .* 2"):
    cursor.take(3, "more")
  with pytest.raises(WeightsError, match="takes 8 bytes"):
    cursor.number("Q", "number")
  assert cursor.take(2, "all") == b"bc"


def test_quotes_are_short_and_of_one_line():
  assert quote("a\nb") == r"'a\nb'"
  assert len(quote("x" * 10**6)) < 100
  inner = ()
  for _ in range(200):  # 2^200 values, were they written out
    inner = (inner, inner)
  assert len(quote(inner)) < 200
  assert count((3, 0, 4)) == 12 and count(()) == 1


def test_inside(tmp_path):
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "a").write_text("")
  (tmp_path / "secret").write_text("")
  assert inside(folder, "a") == folder / "a"
  for name in ("../secret", "/etc/passwd", "..", "", "b/a", "b\\a", "a\0"):
    with pytest.raises(WeightsError, match="not a plain file name"):
      inside(folder, name)
  (folder / "link").symlink_to("../secret")
  (folder / "near").symlink_to("a")
  assert inside(folder, "near") == folder / "near"
  with pytest.raises(WeightsError, match="outside the folder; follow_links"):
    inside(folder, "link")
  assert inside(folder, "link", follow_links=True) == folder / "link"
  (tmp_path / "other").symlink_to(folder)  # the folder itself may be a link
  assert inside(tmp_path / "other", "a") == tmp_path / "other" / "a"
