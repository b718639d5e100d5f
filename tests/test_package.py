"""The package as a user gets it: the wheel, elsewhere, beside hostile files."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PORTIONS = ("attention", "data", "nets", "pallas", "train")
CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy",
        "jaxtyping", "absl-py")  # fmt: skip

pytestmark = pytest.mark.process


def _run(*command, cwd=ROOT, code=0, **kwargs):
  done = subprocess.run(
    [str(c) for c in command], cwd=cwd, capture_output=True, text=True, **kwargs
  )
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout


def _tracked():
  """Files of the package that git knows, or that it would on `git add`."""
  names = _run(
    "git", "ls-files", "--cached", "--others", "--exclude-standard", *PORTIONS
  ).split()
  return [n for n in names if (ROOT / n).is_file()]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
  """A wheel built from a copy, so that the checkout stays clean."""
  copy = tmp_path_factory.mktemp("source")
  for name in [*_tracked(), "pyproject.toml", "README.md", "LICENSE"]:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes((ROOT / name).read_bytes())
  _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=copy)
  return next((copy / "dist").glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
  """Python of a new environment that holds the wheel and sees our packages."""
  env = tmp_path_factory.mktemp("env")
  _run(sys.executable, "-m", "venv", "--without-pip", env)
  python = env / "bin" / "python"
  site = pathlib.Path(
    _run(
      python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    ).strip()
  )
  # A folder named in a .pth is searched, but its own .pth files are not run:
  # the editable install of this checkout isn't seen.
  (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
  _run(
    *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"),
    *("--no-index", "--disable-pip-version-check", "--ignore-installed", wheel),
  )
  return python


@pytest.fixture
def hostile(tmp_path):
  """A folder whose own files have our portions' names, and raise."""
  for name in PORTIONS:
    (tmp_path / f"{name}.py").write_text("raise RuntimeError('not ours')\n")
  for name in ("data", "nets"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('no')\n")
  return tmp_path


def test_the_wheel_holds_what_git_holds(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  assert {n for n in names if not n.startswith("isthmus")} == set()
  ours = {n.removeprefix("isthmus/") for n in names if n.startswith("isthmus/")}
  assert ours == set(_tracked())


def test_the_wheel_works_elsewhere(installed, hostile):
  modules = [
    "isthmus."
    + n.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for n in _tracked()
    if n.endswith(".py") and n != "train/main.py"
  ]
  out = _run(
    *(installed, "-c"),
    "import importlib, sys\n"
    "for m in sys.argv[1:]:\n"
    "  f = importlib.import_module(m).__file__\n"
    "  assert sys.prefix in f, f\n"
    "print(len(sys.argv) - 1)\n",
    *modules,
    cwd=hostile,
  )
  assert int(out) == len(modules) > 30
  script = installed.parent / "isthmus"
  listed = _run(script, "--list", cwd=hostile)
  assert "quickstart" in listed
  assert listed == _run(
    installed, "-m", "isthmus.train.main", "--list", cwd=hostile
  )
  version = importlib.metadata.version("isthmus")
  assert _run(script, "--version", cwd=hostile).strip() == version


def test_types(installed):
  """ty finds nothing on the installed wheel."""
  site = next(installed.parents[1].glob("lib/python*/site-packages/isthmus"))
  ty = pathlib.Path(sysconfig.get_paths()["scripts"]) / "ty"
  _run(ty, "check", "--python", installed.parents[1], site, cwd=site)


def test_arrows_point_down(installed, tmp_path):
  """import-linter's contracts hold; it can't read an editable namespace."""
  out = _run(
    *(installed, "-c"),
    "from importlinter.cli import lint_imports_command; lint_imports_command()",
    *("--config", ROOT / "pyproject.toml", "--no-cache", "--no-logo"),
    cwd=tmp_path,
  )
  assert "Contracts: 2 kept, 0 broken" in out


def _closure(names):
  """Distributions that the given ones need, extras left out."""
  seen, todo = set(), list(names)
  while todo:
    name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
    if name in seen:
      continue
    try:
      needs = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
      continue
    seen.add(name)
    todo += [re.match(r"[\w.-]+", n)[0] for n in needs if "extra ==" not in n]
  return seen


def test_kernels_attention_and_nets_need_the_core_alone():
  """They import where every other package is missing."""
  allowed = _closure(CORE)
  blocked = [
    module
    for module, owners in importlib.metadata.packages_distributions().items()
    if not {re.sub(r"[-_.]+", "-", o).lower() for o in owners} & allowed
    and module != "isthmus"
  ]
  assert {"tensorflow_datasets", "matplotlib", "tensorboardX"} <= set(blocked)
  modules = [
    "isthmus."
    + n.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for n in _tracked()
    if n.endswith(".py") and n.split("/")[0] in ("pallas", "attention", "nets")
  ]
  code = (
    "import importlib, sys\n"
    f"blocked = {set(blocked)!r}\n"
    "class Block:\n"
    "  def find_spec(self, name, path=None, target=None):\n"
    "    if name.split('.')[0] in blocked:\n"
    "      raise ModuleNotFoundError(name, name=name)\n"
    "sys.meta_path.insert(0, Block())\n"
    f"for m in {modules!r}: importlib.import_module(m)\n"
    "import jax\n"
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge._backends, 'a device was asked for at import'\n"
  )
  _run(sys.executable, "-c", code)


def test_one_object_whichever_name():
  """In a checkout `attention` and `isthmus.attention` are one module."""
  code = (
    "import isthmus.attention.sdpa as long\n"
    "import attention, isthmus.attention\n"
    "assert attention is isthmus.attention\n"
    "import attention.sdpa as short\n"
    "assert short is long\n"
    "from attention import attention as a\n"
    "from isthmus.attention import attention as b\n"
    "assert a is b\n"
    "import data.text, isthmus.data.text\n"
    "assert data.text.Text is isthmus.data.text.Text\n"
    "import train.loop, isthmus.train.loop\n"
    "assert train.loop is isthmus.train.loop\n"
  )
  _run(sys.executable, "-c", code)


def test_main_runs_in_a_checkout():
  listed = _run(sys.executable, "-m", "train.main", "--list")
  assert "quickstart" in listed
