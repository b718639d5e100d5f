"""How the processes of pytest-xdist share the tests: what is long comes first.

`--dist loadfile` keeps a file's tests in one process, where they share what is
compiled, and begins with the files of most tests, which are not the longest
ones: at the end all wait for one process. Here the longest begin, and two files
that hold on to all modules or all recipes are shared out.
"""

import re

from xdist.scheduler import LoadFileScheduling

# A minute or more each, the longest first.
LONG = (
  "tests/test_docs.py",
  "tests/train/recipes/test_recipes.py",
  "tests/attention/test_moba.py",
  "tests/train/test_hosts.py",
  "tests/train/test_splits.py",
  "tests/test_docstrings.py",
  "tests/test_contributing.py",
  "tests/pallas/flash/test_mosaic.py",
  "tests/train/optim/test_quant8.py",
  "tests/pallas/moba/test_mosaic.py",
  "tests/train/optim/test_optimisers.py",
  "tests/attention/test_ring.py",
  "tests/nets/test_reversible.py",
  "tests/faults/test_signals.py",
  "tests/nets/test_blocks.py",
  "tests/train/test_loop.py",
  "tests/train/test_sequence.py",
  "tests/faults/test_disk.py",
  "tests/test_colabs.py",
  "tests/faults/test_kills.py",
)


def share(nodeid: str) -> str:
  """What a test is kept together with: its file, or its part of a file."""
  file, _, test = nodeid.partition("::")
  if file == "tests/test_docstrings.py":  # a folder's modules
    part = re.search(r"\[(.*)/", test)
  elif file == "tests/train/recipes/test_recipes.py":  # a recipe
    part = re.search(r"\[(.*)\]", test)
  else:
    part = None
  return f"{file}::{part[1]}" if part else file


def turn(nodeid: str) -> int:
  """The lower, the sooner."""
  file = nodeid.partition("::")[0]
  return LONG.index(file) if file in LONG else len(LONG)


class Shares(LoadFileScheduling):
  """Shares in the order of the tests."""

  def __init__(self, config, log=None):
    super().__init__(config, log)
    config.option.loadscopereorder = False

  def _split_scope(self, nodeid: str) -> str:
    return share(nodeid)
