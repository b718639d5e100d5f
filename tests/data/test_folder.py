"""Folders: every file once and in order; links that lead out are refused."""

import pytest

from isthmus.data.folder import check_link, walk


def test_files_in_order(tmp_path):
  names = ["b", "a/z", "a/y", "a/b/x", "c/1"]
  for name in names:
    path = tmp_path / "root" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  found = [p.relative_to(tmp_path / "root") for p in walk(tmp_path / "root")]
  said = [path.as_posix() for path in found]
  assert said == ["b", "a/y", "a/z", "a/b/x", "c/1"]
  with pytest.raises(FileNotFoundError, match="no folder .*absent"):
    list(walk(tmp_path / "absent"))


def test_links_within_are_fine_and_others_refused(tmp_path):
  root = tmp_path / "root"
  (root / "in").mkdir(parents=True)
  (root / "in" / "x").touch()
  (root / "link").symlink_to(root / "in" / "x")
  assert [path.name for path in walk(root)] == ["link", "x"]
  (tmp_path / "x").touch()
  for name, target, cause in (
    ("out", tmp_path / "x", "'.*root/out' links out of '.*root'"),
    ("up", "../x", "'.*root/up' links out"),
    ("in/folder", tmp_path, "'.*in/folder' is a link to a folder"),
    ("in/same", root / "in", "'.*in/same' is a link to a folder"),
  ):
    (root / name).symlink_to(target)
    with pytest.raises(ValueError, match=cause):
      list(walk(root))
    (root / name).unlink()
  assert check_link(root / "in" / "x", root.resolve()) is None


def test_a_folder_that_is_a_link_itself_is_walked(tmp_path):
  """The name that was given is trusted, what lies below is not."""
  (tmp_path / "real").mkdir()
  (tmp_path / "real" / "x").touch()
  (tmp_path / "root").symlink_to(tmp_path / "real")
  assert [path.name for path in walk(tmp_path / "root")] == ["x"]
