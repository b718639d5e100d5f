"""Sources, packing and the stateless loader. Knows nothing of JAX models."""

if __name__ != "isthmus.data":  # imported from a checkout as plain `data`
  from isthmus.pallas.checkout import alias

  alias(__name__)
else:
  from importlib.metadata import version

  __version__ = version("isthmus")
