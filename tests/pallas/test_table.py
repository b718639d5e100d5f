"""Tables of the package and of the user, and where they lie."""

import json
import pathlib

import jax
import pytest

from isthmus.pallas import table

pytestmark = pytest.mark.once


@pytest.fixture
def folders(tmp_path, monkeypatch):
  """(the package's, the user's), both empty."""
  monkeypatch.setattr(table, "PACKAGED", tmp_path / "pallas" / "tables")
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
  return tmp_path / "pallas" / "tables", tmp_path / "cache" / "tables"


def keep(folder, best, kind="Abacus 2"):
  file = table.place(folder, kind, "flash")
  file.parent.mkdir(parents=True)
  file.write_text(json.dumps({"best": best}))
  return file


def test_the_users_table_comes_before_the_packages(folders):
  packaged = keep(folders[0], {"64": 1})
  assert table.find("Abacus 2", "flash") == [(packaged, {"64": 1})]
  users = keep(folders[1], {"64": 2})
  assert table.find("Abacus 2", "flash") == [
    (users, {"64": 2}),
    (packaged, {"64": 1}),
  ]
  assert table.find("Abacus 3", "flash") == []
  assert table.find("Abacus 2", "other") == []


def test_a_file_is_read_once(folders):
  file = keep(folders[0], {"64": 1})
  assert table.find("Abacus 2", "flash")[0][1] == {"64": 1}
  file.write_text("torn")
  assert table.find("Abacus 2", "flash")[0][1] == {"64": 1}


@pytest.mark.parametrize(
  "text, said",
  [
    ("{", "is not JSON: "),
    ("[]", '"best" is missing, or not an object'),
    ('{"best": 3}', '"best" is missing, or not an object'),
  ],
)
def test_what_is_no_table_is_one_line(folders, text, said):
  file = keep(folders[1], {})
  file.write_text(text)
  with pytest.raises(ValueError) as caught:
    table.find("Abacus 2", "flash")
  message = str(caught.value)
  assert str(file) in message and said in message and "\n" not in message


def test_bytes_that_are_no_text_are_named(folders):
  file = keep(folders[1], {})
  file.write_bytes(b"\xff\xfe{}")
  with pytest.raises(ValueError, match="is not JSON"):
    table.find("Abacus 2", "flash")


def test_folder_for_caches(monkeypatch):
  monkeypatch.setattr(table.sys, "platform", "linux")
  monkeypatch.delenv("ISTHMUS_CACHE", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
  assert table.cached() == pathlib.Path("/shared/isthmus/tables")
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert table.cached() == pathlib.Path.home() / ".cache/isthmus/tables"
  monkeypatch.setenv("ISTHMUS_CACHE", "~/mine")
  assert table.cached() == pathlib.Path.home() / "mine/tables"


def test_a_kind_is_a_safe_folder():
  file = table.place(pathlib.Path("x"), "NVIDIA H100/80GB: HBM3", "flash")
  assert file == pathlib.Path("x/NVIDIA_H100_80GB_HBM3/flash.json")


def test_new_tables_go_to_the_package_only_in_a_checkout(folders, tmp_path):
  assert table.destination("a", "flash") == folders[1] / "a" / "flash.json"
  (tmp_path / "pyproject.toml").touch()
  assert table.destination("a", "flash") == folders[0] / "a" / "flash.json"


def test_kind_of_the_default_device():
  assert table.device_kind() == jax.local_devices()[0].device_kind
  with jax.default_device(jax.devices("cpu")[1]):
    assert table.device_kind() == "cpu"
  with jax.default_device("cpu"):
    assert table.device_kind() == "cpu"


def test_packaged_tables_name_their_device_and_origin():
  for file in table.PACKAGED.glob("*/*.json"):
    found = json.loads(file.read_text())
    assert table.place(table.PACKAGED, found["device"], file.stem) == file
    assert {"jax", "date", "command", "times", "best"} <= set(found)
