"""Kernels and their dispatch. Knows arrays only."""

if __name__ != "isthmus.pallas":  # imported from a checkout as plain `pallas`
  from isthmus.pallas.checkout import alias

  alias(__name__)
else:
  from importlib.metadata import version

  __version__ = version("isthmus")
