"""`python -m tests.golden [--write]`: compares or rewrites the golden files."""

import argparse

from tests.golden import trees


def main() -> int:
  parser = argparse.ArgumentParser(prog="python -m tests.golden")
  parser.add_argument("--write", action="store_true", help="rewrite the files")
  if parser.parse_args().write:
    changed = list(trees.write())
    print("\n".join(f"wrote {name}" for name in changed) or "nothing changed")
    return 0
  status = 0
  for name, make in trees.subjects().items():
    text = trees.difference(trees.kept(name), make())
    if text is not None:
      print(f"{name}: {text}")
      status = 1
  for name in trees.orphans():
    print(f"{name}: the file has no subject")
    status = 1
  return status


if __name__ == "__main__":
  raise SystemExit(main())
