"""The standard library as a corpus: complete, stable and split by path."""

import pathlib
import sys
import sysconfig

import pytest

from isthmus.data import library
from isthmus.data.library import PythonLibrary


@pytest.fixture
def tree(tmp_path, monkeypatch):
  """A small library with everything that must be left out."""
  files = {
    "os.py": "import abc", "abc.py": "x = 1", "json/__init__.py": "j = 2",
    "json/copy.py": "x = 1", "empty.py": "", "data.txt": "no",
    "site-packages/p.py": "no1", "test/t.py": "no2", "json/tests/t.py": "no3",
    "idlelib/idle_test/t.py": "no4", "__pycache__/c.py": "no5",
    "config-3.12-x86/python-config.py": "no6", "_sysconfigdata__l.py": "no7",
    "sitecustomize.py": "no8", "dist-packages/q.py": "no9",
  }  # fmt: skip
  root = tmp_path / "lib"
  for name, text in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
  (tmp_path / "outside.py").write_text("no10")
  (root / "link.py").symlink_to(tmp_path / "outside.py")
  monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
  return root


def names(corpus, split):
  return [name for name, _ in corpus.documents(split)]


def test_only_the_library_itself_in_order_and_once(tree):
  corpus = PythonLibrary(eval_fraction=0.0)
  # json/copy.py repeats abc.py, which comes first.
  assert names(corpus, "train") == ["abc.py", "json/__init__.py", "os.py"]
  assert names(corpus, "eval") == []
  assert names(PythonLibrary(eval_fraction=1.0), "train") == []


def test_fingerprint_follows_content_and_counts_are_right(tree):
  before = PythonLibrary().describe()
  assert before["train_files"] + before["eval_files"] == 3
  assert before["train_bytes"] + before["eval_bytes"] == 20
  (tree / "os.py").write_text("import abd")
  after = PythonLibrary().describe()
  assert before["fingerprint"] != after["fingerprint"]
  assert before["python"] == ".".join(map(str, sys.version_info[:3]))


def test_no_sources_names_the_remedy(tree):
  for path in tree.rglob("*.py"):
    path.unlink()
  with pytest.raises(FileNotFoundError, match="TextFiles"):
    names(PythonLibrary(), "train")


def test_this_interpreters_library_is_split_by_path():
  corpus = PythonLibrary()
  train, held = (dict(corpus.documents(s)) for s in ("train", "eval"))
  assert len(train) > 300 and len(held) > 10
  assert sum(map(len, train.values())) > 5e6
  assert not set(train.values()) & set(held.values())
  for name in train | held:
    parts = pathlib.PurePosixPath(name).parts
    assert not library._SKIPPED & set(parts) and not name.startswith("/")
  # Pinned: a change of the hash would leak held-out files into training.
  assert {"gzip.py", "hashlib.py", "pprint.py", "token.py"} <= held.keys()
  assert {"ast.py", "os.py", "typing.py"} <= train.keys()


def test_settings():
  assert hash(PythonLibrary(eval_fraction=0.1)) != hash(PythonLibrary())
  with pytest.raises(ValueError, match="eval_fraction is -0.1"):
    PythonLibrary(eval_fraction=-0.1)
