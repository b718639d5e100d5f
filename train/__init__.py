"""Jobs, the one loop, optimisers, checkpoints, recipes and the command line."""

if __name__ != "isthmus.train":  # imported from a checkout as plain `train`
  from isthmus.pallas.checkout import alias

  alias(__name__)
else:
  from importlib.metadata import version

  __version__ = version("isthmus")
