"""Attention over chosen blocks: masks, mechanisms, caches. Knows no parameters."""

if __name__ != "isthmus.attention":  # imported from a checkout as plain `attention`
  from isthmus.pallas.checkout import alias

  alias(__name__)
else:
  from importlib.metadata import version

  __version__ = version("isthmus")
