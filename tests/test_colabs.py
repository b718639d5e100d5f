"""The notebooks run from the top, and are what their sources say.

`colabs/NAME.py` is the source, in jupytext's percent format; `NAME.ipynb` is
made of it by `python -m tests.test_colabs --write`, without outputs.
"""

import pathlib
import sys

import jupytext
import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "colabs"
SOURCES = sorted(FOLDER.glob("*.py"))
METADATA = {
  "jupytext": {"formats": "ipynb,py:percent"},
  "kernelspec": {
    "display_name": "Python 3",
    "language": "python",
    "name": "python3",
  },
  "language_info": {"name": "python"},
}
# Before the first cell: whatever asks for another machine fails.
OFFLINE = """
import socket

def _refuse(self, address, *rest):
  if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
    raise OSError(f"a notebook asks for {address}")
  return _connect(self, address, *rest)

_connect, socket.socket.connect = socket.socket.connect, _refuse
"""


def notebook(source: str) -> nbformat.NotebookNode:
  """A notebook of a percent file, the same to the byte each time."""
  book = jupytext.reads(source, fmt="py:percent")
  book.metadata = nbformat.from_dict(METADATA)
  for i, cell in enumerate(book.cells):
    cell.id, cell.metadata = f"cell-{i:02d}", nbformat.from_dict({})
  book.nbformat, book.nbformat_minor = 4, 5
  return book


def write() -> list[str]:
  """Puts every .ipynb in step with its source; the names of those changed."""
  changed = []
  for path in SOURCES:
    target = path.with_suffix(".ipynb")
    text = nbformat.writes(notebook(path.read_text())) + "\n"
    if not target.is_file() or target.read_text() != text:
      target.write_text(text)
      changed.append(target.name)
  return changed


def execute(source: str, folder: pathlib.Path) -> nbformat.NotebookNode:
  """Runs all cells in a new kernel, in `folder`.

  Raises:
    CellExecutionError: with the cell that failed, and how.
  """
  book = notebook(source)
  book.cells.insert(0, nbformat.v4.new_code_cell(OFFLINE, id="offline"))
  client = nbclient.NotebookClient(
    book, timeout=120, resources={"metadata": {"path": str(folder)}}
  )
  return client.execute()


def printed(book: nbformat.NotebookNode) -> str:
  return "".join(
    output.get("text", "") for cell in book.cells for output in _outputs(cell)
  )


def _outputs(cell):
  return cell.get("outputs", []) if cell.cell_type == "code" else []


@pytest.fixture
def fast(monkeypatch, tmp_path):
  """The environment of a kernel: tiny sizes, one CPU device."""
  monkeypatch.setenv("ISTHMUS_FAST", "1")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  folder = tmp_path / "work"
  folder.mkdir()
  return folder


def test_there_are_notebooks():
  assert {"kernels", "quickstart", "write_your_own_recipe"} <= {
    p.stem for p in SOURCES
  }
  others = {p.stem for p in FOLDER.glob("*.ipynb")} - {p.stem for p in SOURCES}
  assert not others, f"without a source: {others}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_the_pair_is_in_step(path):
  text = nbformat.writes(notebook(path.read_text())) + "\n"
  kept = path.with_suffix(".ipynb")
  assert kept.is_file() and kept.read_text() == text, (
    f"{kept.name} is not made of {path.name}: edit the .py, and run "
    "`python -m tests.test_colabs --write`"
  )
  assert not any(_outputs(cell) for cell in nbformat.read(kept, 4).cells)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_the_machine_is_said_first(path):
  """Of code, only what installs comes before it; there is a sanity check."""
  cells = [
    c.source for c in notebook(path.read_text()).cells if c.cell_type == "code"
  ]
  assert "google.colab" in cells[0] and "doctor.summary()" in cells[1]
  assert any("\nassert " in source for source in cells)


@pytest.mark.process
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_it_runs_without_a_network(path, fast):
  text = printed(execute(path.read_text(), fast))
  assert "cpu: attention runs on XLA; the fast kernels need" in text
  assert "jax " in text and "attention, bfloat16, causal: chunked" in text
  assert not list(fast.iterdir()), "a notebook writes beside itself"


@pytest.mark.process
def test_a_failure_shows_its_cell(fast):
  """A copy whose misspelling was mended, and so isn't refused."""
  source = (FOLDER / "quickstart.py").read_text().partition("## Training")[0]
  assert source.count("model.widht=64") == 1
  with pytest.raises(nbclient.exceptions.CellExecutionError) as error:
    execute(source.replace("model.widht=64", "model.width=64"), fast)
  assert 'config.load("quickstart:smoke", ["model.width=64"])' in str(
    error.value
  )
  assert "a misspelled field was accepted\n" in str(error.value)


@pytest.mark.process
def test_asking_the_network_fails(fast):
  ask = "# %%\nimport socket\nsocket.create_connection(('192.0.2.1', 80))\n"
  with pytest.raises(nbclient.exceptions.CellExecutionError, match="asks for"):
    execute(ask, fast)


if __name__ == "__main__":
  if sys.argv[1:] != ["--write"]:
    raise SystemExit("usage: python -m tests.test_colabs --write")
  print("\n".join(f"wrote {name}" for name in write()) or "nothing changed")
