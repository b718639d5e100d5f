"""Eight host devices; shapes and types of public boundaries checked."""

import os
import pathlib
import platform
import re
import signal
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


def pytest_configure(config):
  # Under `nohup`, or in the background of a shell, these are ignored, and a run
  # would rightly leave them so.
  signal.signal(signal.SIGHUP, signal.SIG_DFL)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  if not _asked(config, "gpu"):
    # Programs run once here, and most of a run is XLA's work on them: up to
    # half less without LLVM's optimisations and by emitters that need no MLIR.
    # XLA_FLAGS=--xla_backend_optimization_level=3 runs what users run.
    level = "xla_backend_optimization_level"
    if level not in (flags := os.environ.get("XLA_FLAGS", "")):
      plain = "xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
      os.environ["XLA_FLAGS"] = f"{flags} --{level}=0 --{plain}".strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(config, items):
  """`gpu`, `parity`, `slow` tests run only when their marker is asked for."""
  for item in items:
    for name in ("gpu", "parity", "slow"):
      if item.get_closest_marker(name) and not _asked(config, name):
        item.add_marker(pytest.mark.skip(reason=f"run with -m {name}"))
