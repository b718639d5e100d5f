"""The command line: refusals in one line, lists, generation, folders."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from isthmus.attention import sdpa
from isthmus.train import cli, config, recipe
from isthmus.train.ckpt import restore_params
from isthmus.train.export import load_safetensors
from isthmus.train.jobs import Fit
from tests.train.child import TOY

process = pytest.mark.process
SMOKE = ["--config", "quickstart:smoke"]
QUICK = ["--config", str(TOY), "--set", "steps=2", "--set", "eval_every=0"]


def _call(capsys, *argv):
  """(status, stdout, stderr) of the command in this process."""
  capsys.readouterr()
  try:
    status = cli.main([str(a) for a in argv])
  except SystemExit as end:
    status = end.code
  found = capsys.readouterr()
  return status, found.out, found.err


def _python(*argv, **kwargs):
  return subprocess.run(
    [sys.executable, "-m", "isthmus.train.main", *map(str, argv)],
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    **kwargs,
  )


# --- refused in one line ---


@pytest.mark.parametrize(
  "argv, words",
  [
    (["--config", "quikstart"], ["'quikstart'", "'quickstart'"]),
    (["--config", ""], ["no such recipe"]),
    (["--config", "quickstart:smok"], ["'smok'", "'smoke'"]),
    (["--config", "nowhere/mine.py"], ["nowhere/mine.py", "no such file"]),
    ([*SMOKE, "--set", "batch_sise=3"], ["batch_sise", "'batch_size'"]),
    ([*SMOKE, "--set", "model.widht=3"], ["widht", "'width'"]),
    ([*SMOKE, "--set", "modle.width=3"], ["modle", "'model'"]),
    ([*SMOKE, "--set", "model.width=abc"], ["model.width=abc", "int"]),
    ([*SMOKE, "--set", "model.width=6.5"], ["model.width=6.5", "int"]),
    ([*SMOKE, "--set", "steps=True"], ["steps=True", "int"]),
    ([*SMOKE, "--set", "batch_size=0"], ["batch_size is 0"]),
    ([*SMOKE, "--set", "save_every=-1"], ["save_every is -1"]),
    ([*SMOKE, "--set", "accumulate=3"], ["accumulate 3", "batch_size 8"]),
    ([*SMOKE, "--set", "model.width=30"], ["width 30", "num_heads 4"]),
    ([*SMOKE, "--set", "mesh.dta=8"], ["'dta'", "'data'"]),
    ([*SMOKE, "--set", "mesh.data=3"], ["data=3", "8 devices"]),
    ([*SMOKE, "--set", "batch_size=12"], ["batch_size 12", "8"]),
    ([*SMOKE, "--set", "optimizer.decay=cosin"], ["'cosine'"]),
    ([*SMOKE, "--set", "optimizer.scale.b3=1"], ["'b3'", "'b2'"]),
    ([*SMOKE, "--set", "model.dtype=float33"], ["model.dtype", "dtype"]),
    ([*SMOKE, "--set", "data.seq_len=0"], ["seq_len is 0"]),
    ([*SMOKE, "--set", "data.corpus.eval_fraction=0"], ["'eval'", "0 bytes"]),
    ([*SMOKE, "--set", "profile=(3,99)"], ["profile is (3, 99)", "8 steps"]),
    ([*SMOKE, "--set", "steps"], ["'steps'", "name=value"]),
    ([*SMOKE, "--set", ""], ["name=value"]),
    ([*SMOKE, "--set", "model=3"], ["model.width", "not set whole"]),
    (["--stes", "3"], ["'--stes'", "'--set'"]),
    (["--work", "x"], ["'--work'", "'--workdir'"]),
    (["--workdir"], ["--workdir", "expected one argument"]),
    (["--processes", "two"], ["--processes", "'two'"]),
    (["--processes", "2"], ["--coordinator", "together"]),
    (
      "--coordinator here --processes 2 --process 0".split(),
      ["--coordinator here", "HOST:PORT"],
    ),
    (
      "--coordinator localhost:1 --processes 2 --process 2".split(),
      ["--process 2", "--processes 2"],
    ),
    (["shwo", "quickstart"], ["'shwo'", "'show'"]),
    (["show", "quikstart"], ["'quikstart'", "'quickstart'"]),
    (["show"], ["name"]),
    (["doctor", "--verbose"], ["'--verbose'"]),
    (["generate"], ["--workdir"]),
    (["generate", "--workdir", "nowhere"], ["nowhere holds no run"]),
    (["table", "--write", "nowhere.md"], ["nowhere.md", "No such file"]),
  ],
)
def test_refused(capsys, tmp_path, monkeypatch, argv, words):
  monkeypatch.chdir(tmp_path)
  status, out, err = _call(capsys, *argv)
  assert status == 2, err
  assert out == ""
  assert len(err.splitlines()) == 1, err
  for word in words:
    assert word in err, err
  assert not list(tmp_path.rglob("ckpt/*"))


@process
def test_refused_by_the_real_command(tmp_path):
  done = _python(*SMOKE, "--set", "model.widht=3", cwd=tmp_path)
  assert (done.returncode, done.stdout) == (2, "")
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert "did you mean 'width'" in done.stderr


# --- folders ---


def _refused_folder(capsys, workdir, *words):
  status, _, err = _call(capsys, *QUICK, "--workdir", workdir)
  assert status == 2, err
  assert len([x for x in err.splitlines() if "isthmus:" in x]) == 1, err
  assert "Traceback" not in err
  for word in words:
    assert word in err, err


def test_a_workdir_that_is_no_folder(capsys, tmp_path):
  path = tmp_path / "file"
  path.write_text("mine")
  _refused_folder(capsys, path, str(path))
  _refused_folder(capsys, path / "inner", "file/inner")
  assert path.read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="Linux")
def test_a_workdir_that_nobody_may_write(capsys):
  """Not even root."""
  _refused_folder(capsys, "/sys/isthmus", "/sys/isthmus", "not permitted")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_workdir_that_is_read_only(capsys, tmp_path):
  folder = tmp_path / "fixed"
  folder.mkdir(mode=0o500)
  _refused_folder(capsys, folder, "fixed", "Permission denied")
  _refused_folder(capsys, folder / "inner", "inner", "Permission denied")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_folder_where_a_file_should_be(capsys, tmp_path, name):
  (tmp_path / name).mkdir()
  _refused_folder(capsys, tmp_path, name, "directory")


def test_damaged_settings(capsys, tmp_path):
  (tmp_path / "config.json").write_text('{"resol')
  _refused_folder(capsys, tmp_path, "config.json", "damaged")


@pytest.mark.parametrize(
  "argument, name",
  [("quickstart:smoke", "quickstart-smoke"), (f"{TOY}:all", "toy-all")],
)
def test_the_default_workdir(capsys, tmp_path, monkeypatch, argument, name):
  monkeypatch.chdir(tmp_path)
  seen = []
  monkeypatch.setattr(
    Fit, "run", lambda self, workdir, **_: seen.append(workdir) or {}
  )
  status, _, _ = _call(capsys, "--config", argument)
  assert status == 0 and seen == [pathlib.Path("runs") / name]


# --- what it shows ---


def test_list(capsys):
  status, out, err = _call(capsys, "--list")
  assert (status, err) == (0, "")
  assert [x.split()[0] for x in out.splitlines()] == config.recipe_names()
  assert recipe.read("quickstart").title in out


@process
def test_list_into_a_pipe_that_nobody_reads():
  """`isthmus --list | head -0`."""
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run(
    [sys.executable, "-m", "isthmus.train.main", "--list"],
    stdout=writer,
    stderr=subprocess.PIPE,
    timeout=120,
    env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
  )
  os.close(writer)
  assert (done.returncode, done.stderr) == (0, b"")


def test_version(capsys):
  from isthmus import train

  assert _call(capsys, "--version") == (0, f"{train.__version__}\n", "")


def test_help_names_every_command(capsys):
  status, out, _ = _call(capsys, "--help")
  assert status == 0
  for command in cli.COMMANDS:
    assert f"isthmus {command}" in " ".join(out.split())


def test_show(capsys):
  status, out, _ = _call(capsys, "show", "quickstart")
  assert status == 0
  found = recipe.read("quickstart")
  for field in ("Core", "Claim", "Measured", "Command"):
    assert found[field] in out
  assert "train/recipes/quickstart.py" in out


def test_doctor(capsys):
  status, out, _ = _call(capsys, "doctor")
  assert status == 0
  assert f"jax {jax.__version__}" in out
  for device in jax.devices():
    assert f"device {device.id}: cpu" in out
  lines = [x for x in out.splitlines() if x.startswith("attention, ")]
  for impl in sdpa.OP.impls:
    about = [x for x in lines if f": {impl.name} " in x]
    assert about, impl.name
    for line in about:
      verdict, _, reason = line.partition(f": {impl.name} ")[2].partition(": ")
      assert verdict in ("runs", "could") or (verdict, bool(reason)) == (
        "refuses",
        True,
      )
  assert any(": cudnn refuses: " in x for x in lines)


def test_table(capsys, tmp_path):
  status, out, _ = _call(capsys, "table")
  assert status == 0 and out == recipe.table() + "\n"
  assert "| `quickstart` |" in out
  path = tmp_path / "page.md"
  begin, end = "<!-- systems: isthmus table -->", "<!-- end -->"
  path.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
  for _ in range(2):  # the second time changes nothing
    assert _call(capsys, "table", "--write", path) == (0, "", "")
    expected = f"above\n{begin}\n{recipe.table()}\n{end}\nbelow\n"
    assert path.read_text() == expected
  path.write_text("no marks")
  status, _, err = _call(capsys, "table", "--write", path)
  assert status == 2 and "lacks the marks" in err
  assert path.read_text() == "no marks"


# --- generation ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("text") / "run"
  more = ["--set", "steps=2", "--set", "eval_every=0", "--workdir", workdir]
  assert cli.main([str(a) for a in (*SMOKE, *more)]) == 0
  return workdir


def _generate(capsys, workdir, *more):
  argv = ["generate", "--workdir", workdir, "--prompt", "import os", *more]
  return _call(capsys, *argv)


def test_generate(capsys, trained):
  longer = ["--set", "length=8", "--set", "temperature=1.5"]
  status, out, err = _generate(capsys, trained, *longer)
  assert status == 0, err
  assert out.startswith("import os") and len(out) > len("import os\n")
  again = _generate(capsys, trained, *longer)
  assert again == (status, out, err)
  bare = _call(capsys, "generate", "--workdir", trained, *longer)
  assert bare[0] == 0 and len(bare[1]) > 1  # without a prompt
  other = _generate(capsys, trained, *longer, "--set", "seed=1")
  assert other[0] == 0 and other[1] != out


@pytest.mark.parametrize(
  "more, words",
  [
    (["--set", "lenght=8"], ["lenght", "'length'"]),
    (["--set", "length=no"], ["length=no", "int"]),
    (["--set", "length=0"], ["length"]),
    (["--set", "temperature=-1"], ["temperature"]),
    (["--set", "step=1"], ["step 1", "there are: 2"]),
    (["--promt", "x"], ["'--promt'", "'--prompt'"]),
  ],
)
def test_generate_refused(capsys, trained, more, words):
  status, _, err = _generate(capsys, trained, *more)
  assert status == 2, err
  assert len(err.splitlines()) == 1, err
  for word in words:
    assert word in err, err


def test_generate_from_what_is_no_text(capsys, tmp_path):
  assert _call(capsys, *QUICK, "--workdir", tmp_path)[0] == 0
  # A folder somebody gave you doesn't choose the code that is run.
  status, _, err = _generate(capsys, tmp_path)
  assert status == 2 and err.count("\n") == 1
  assert "was made by the code in" in err and "give it as --config" in err
  status, _, err = _generate(capsys, tmp_path, "--config", TOY)
  assert status == 2 and "no model of text" in err


# --- export ---


def test_export_says_what_it_leaves_out(capsys, tmp_path):
  """Running statistics are no parameters."""
  assert _call(capsys, *QUICK, "--workdir", tmp_path)[0] == 0
  path = tmp_path / "model.safetensors"
  status, _, err = _call(capsys, "export", "--workdir", tmp_path, path)
  assert status == 0 and path.is_file()
  assert err.count("\n") == 1 and "is left out" in err
  assert "mutables/batch_stats/norm/mean" in err


def test_export(capsys, trained, tmp_path):
  path = tmp_path / "model.safetensors"
  status, out, err = _call(capsys, "export", "--workdir", trained, path)
  assert status == 0, err
  assert out == f"step 2: {path}\n" and not err
  _, params = restore_params(trained / "ckpt")
  jax.tree.map(np.testing.assert_array_equal, load_safetensors(path), params)


@pytest.mark.parametrize(
  "more, words",
  [
    (["--step", "1", "x.safetensors"], ["step 1", "there are: 2"]),
    (["nowhere/x.safetensors"], ["nowhere/x.safetensors"]),
    ([], ["FILE.safetensors"]),
  ],
)
def test_export_refused(capsys, trained, more, words):
  status, _, err = _call(capsys, "export", "--workdir", trained, *more)
  assert status == 2, err
  assert len(err.splitlines()) == 1, err
  for word in words:
    assert word in err, err
