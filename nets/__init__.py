"""Linen modules and pure functions over parameters."""

if __name__ != "isthmus.nets":  # imported from a checkout as plain `nets`
  from isthmus.pallas.checkout import alias

  alias(__name__)
else:
  from importlib.metadata import version

  __version__ = version("isthmus")
