"""Eight host devices, typed keys, strict promotion, shapes checked at run time."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jaxtyping
import pytest

# Public boundaries are annotated with shapes; in tests they are checked.
jaxtyping.install_import_hook("isthmus", "beartype.beartype")


def pytest_configure(config):
  if "gpu" not in (config.option.markexpr or ""):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(config, items):
  """`gpu` and `slow` tests run only when their marker is asked for."""
  asked = config.option.markexpr or ""
  for item in items:
    for name in ("gpu", "slow"):
      if item.get_closest_marker(name) and name not in asked:
        item.add_marker(pytest.mark.skip(reason=f"run with -m {name}"))
