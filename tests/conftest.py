"""Eight host devices; shapes and types of public boundaries checked."""

import gc
import os
import pathlib
import platform
import re
import signal
import sys
import tempfile
from importlib.metadata import version

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tests run side by side: more threads than cores would wait for each other by
# spinning, which makes a product of matrices ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Many tests train the same little run again: its step is compiled once, by
# whichever process comes first. A folder a version, for jax doesn't tell them
# apart; a folder a user, for it is executed.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(
    pathlib.Path(tempfile.gettempdir())
    / f"isthmus-tests-{os.getuid()}"
    / f"{version('jaxlib')}-{platform.python_version()}"
  ),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Programs say of no operation which lines it comes from, which is work saved.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import jaxtyping
import pytest

import tests.typecheck  # noqa: F401 (named in the hook)

# Public boundaries are annotated with shapes; in tests they are checked.
jaxtyping.install_import_hook("isthmus", "tests.typecheck.check")


def _asked(config, name):
  """Whether -m asks for a marker; `not gpu` doesn't."""
  expression = config.option.markexpr or ""
  return re.search(rf"(?<!not )\b{name}\b", expression) is not None


def _keep_bytecode():
  """Where Python is told to keep no bytecode, it is kept beside the programs.

  Without, importing jax takes three times as long, and tests start many
  processes.
  """
  if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "bytecode"
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(folder)
    sys.dont_write_bytecode = False


def pytest_configure(config):
  _keep_bytecode()
  # Under `nohup`, or in the background of a shell, these are ignored, and a run
  # would rightly leave them so.
  signal.signal(signal.SIGHUP, signal.SIG_DFL)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  if not _asked(config, "gpu"):
    # Programs run once here, and most of a run is XLA's work on them: up to
    # half less without LLVM's optimisations and by emitters that need no MLIR,
    # and less again where a program isn't cut into pieces, which are for more
    # cores than a test has.
    # XLA_FLAGS=--xla_backend_optimization_level=3 runs what users run.
    level = "xla_backend_optimization_level"
    if level not in (flags := os.environ.get("XLA_FLAGS", "")):
      plain = "xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
      whole = "xla_cpu_parallel_codegen_split_count=1"
      flags = f"{flags} --{level}=0 --{plain} --{whole}"
      os.environ["XLA_FLAGS"] = flags.strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_finish():
  """What is imported is no garbage, and little of what tracing makes is."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """`--dist loadfile`, where what is long comes first (tests/shares.py)."""
  if config.option.dist != "loadfile":
    return None
  from tests.shares import Shares

  return Shares(config, log)


def pytest_collection_modifyitems(config, items):
  """`gpu`, `parity`, `slow` tests run only when their marker is asked for."""
  for item in items:
    for name in ("gpu", "parity", "slow"):
      if item.get_closest_marker(name) and not _asked(config, name):
        item.add_marker(pytest.mark.skip(reason=f"run with -m {name}"))
  if hasattr(config, "workerinput"):  # a process of pytest-xdist
    from tests.shares import turn

    items.sort(key=lambda item: turn(item.nodeid))
