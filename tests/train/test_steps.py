"""The folder of steps, and what a kill leaves in it."""

import pytest

from isthmus.train import manifest, steps
from isthmus.train.steps import CheckpointError


def make(folder, name, text, *, complete=True):
  path = folder / name
  path.mkdir(parents=True)
  (path / "data").write_text(text)
  if complete:
    number = int(name.split(".")[0])
    manifest.write(path, step=number, leaves=[], extra=None)


def listing(folder):
  return sorted(p.name for p in folder.iterdir())


def test_what_counts(tmp_path):
  for name in ("3", "10", "9"):
    make(tmp_path, name, "x")
  make(tmp_path, "11", "x", complete=False)
  make(tmp_path, "12.pending", "x")
  (tmp_path / "007").mkdir()
  (tmp_path / "notes").mkdir()
  assert steps.numbers(tmp_path) == [3, 9, 10, 11]
  assert steps.finished(tmp_path) == [3, 9, 10]
  assert steps.find(tmp_path, None) == (10, [11])
  assert steps.numbers(tmp_path / "none") == []
  assert steps.find(tmp_path / "none", None) == (None, [])


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path):
  make(tmp_path, "4", "good")
  ours = (
    "5.pending",
    "5.pending.orbax-checkpoint-tmp",
    "6.orbax-checkpoint-tmp-1234",
    "2.deleted",
  )
  theirs = ("notes.txt", "mine.pending", "5.pending.bak", "a.deleted", "7")
  for name in (*ours, *theirs):
    make(tmp_path, name, "x", complete=False)
  steps.tidy(tmp_path)
  assert listing(tmp_path) == sorted(["4", *theirs])


@pytest.mark.parametrize("old", [None, "4", "4.replaced"])
def test_a_complete_pending_step_is_finished(tmp_path, old):
  """Killed before, between and after the renames of a replacement."""
  make(tmp_path, "4.pending", "new")
  if old:
    make(tmp_path, old, "old")
  steps.tidy(tmp_path)
  assert listing(tmp_path) == ["4"]
  assert (tmp_path / "4" / "data").read_text() == "new"
  assert steps.find(tmp_path, None) == (4, [])


def test_a_replaced_step_comes_back_if_nothing_took_its_place(tmp_path):
  make(tmp_path, "4.replaced", "old")
  make(tmp_path, "4.pending", "half", complete=False)
  steps.tidy(tmp_path)
  assert listing(tmp_path) == ["4"]
  assert (tmp_path / "4" / "data").read_text() == "old"


def test_a_replaced_step_goes_when_its_successor_is_there(tmp_path):
  make(tmp_path, "4", "new")
  make(tmp_path, "4.replaced", "old")
  steps.tidy(tmp_path)
  assert listing(tmp_path) == ["4"]
  assert (tmp_path / "4" / "data").read_text() == "new"


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
  def refuse(directory):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(steps, "numbers", refuse)
  with pytest.raises(CheckpointError, match="Permission denied"):
    steps.find(tmp_path, None)
