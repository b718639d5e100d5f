"""`python -m isthmus.attention.bench`: calls `cli`, and defines nothing."""

import sys

from isthmus.attention.bench.cli import main

if __name__ == "__main__":
  sys.exit(main())
