"""`python -m train.main`: calls `isthmus.train.cli`, and defines nothing."""

import sys

try:
  from isthmus.train.cli import main
except ModuleNotFoundError as error:
  if (error.name or "").split(".")[0] != "isthmus":
    raise
  sys.exit("isthmus isn't installed: `make train`, or `pip install -e .`")

if __name__ == "__main__":
  sys.exit(main())
