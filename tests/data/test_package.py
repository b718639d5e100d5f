"""Files of other packages: found without an import, or named with a remedy."""

import sys

import pytest

from isthmus.data.package import package_file


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A package that cannot be imported, with one file in it."""
  root = tmp_path / "sourpackage"
  (root / "data").mkdir(parents=True)
  (root / "__init__.py").write_text("raise RuntimeError('imported')\n")
  (root / "data" / "x.csv").write_text("1,2\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  return root


def test_file_is_found_without_importing_the_package(package):
  path = package_file("sourpackage", "data/x.csv", name="It", extra="data")
  assert path == package / "data" / "x.csv"
  assert "sourpackage" not in sys.modules


def test_missing_package_and_missing_file_say_what_to_do(package):
  with pytest.raises(ImportError, match=r"It .* sour: .*'isthmus\[video\]'"):
    package_file("nosuchthing", "x", name="It", extra="video",
                 distribution="sour")  # fmt: skip
  with pytest.raises(FileNotFoundError, match="y.csv of the package sour.*pip"):
    package_file("sourpackage", "data/y.csv", name="It", extra="data")
