"""One module object a file, whichever of its two names a checkout is asked for.

In a checkout the folders `attention/`, `nets/`, ... can be imported both as
`attention` and as `isthmus.attention`. Two names would make two modules, and
so two copies of every class. Here the short name becomes an alias of the long
one, submodules included.
"""

import importlib
import importlib.abc
import importlib.util
import sys

# `python -m train.main` executes this file itself, so it keeps its own spec.
_RUN = ("train.main",)


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Imports `attention.sdpa` as `isthmus.attention.sdpa`."""

  def __init__(self, portion: str):
    self.portion = portion

  def find_spec(self, fullname, path=None, target=None):
    if fullname in _RUN or not fullname.startswith(self.portion + "."):
      return None
    return importlib.util.spec_from_loader(fullname, self)

  def exec_module(self, module):
    name = module.__name__
    sys.modules[name] = importlib.import_module("isthmus." + name)


def alias(portion: str) -> None:
  """Makes the top-level name `portion` the module `isthmus.<portion>`.

  Example:
    >>> alias("pallas")
    >>> import pallas.dispatch
    >>> pallas.dispatch is sys.modules["isthmus.pallas.dispatch"]
    True
  """
  sys.modules[portion] = importlib.import_module("isthmus." + portion)
  sys.meta_path.insert(0, _Alias(portion))
