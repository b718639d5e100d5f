"""Eight host devices; shapes and types of public boundaries checked."""

import os
import re

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

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
  if not _asked(config, "gpu"):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(config, items):
  """`gpu` and `slow` tests run only when their marker is asked for."""
  for item in items:
    for name in ("gpu", "slow"):
      if item.get_closest_marker(name) and not _asked(config, name):
        item.add_marker(pytest.mark.skip(reason=f"run with -m {name}"))
