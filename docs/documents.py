"""Pages made of the documents at the root, whose links lead to files there."""

import pathlib
import re

from sources import ROOT

# page -> (title, sections of the README)
_SECTIONS = {
  "install.md": (
    "Install",
    ("Two commands", "Three ways to use it", "What it runs on"),
  ),
  "library.md": (
    "What there is",
    (
      "Attention",
      "Data and weights without a download",
      "What the loop does",
      "Measured",
      "Limits",
    ),
  ),
}
_WHOLE = {
  "changelog.md": "CHANGELOG.md",
  "contributing.md": "CONTRIBUTING.md",
  "security.md": "SECURITY.md",
}


def documents() -> dict[str, str]:
  """Pages by name."""
  readme = _sections((ROOT / "README.md").read_text())
  pages = {}
  for name, (title, wanted) in _SECTIONS.items():
    for heading in wanted:
      if heading not in readme:
        raise ValueError(
          f"README.md has no section {heading!r}, which {name} is made of; "
          f"name another in {pathlib.Path(__file__).name}"
        )
    parts = (f"## {heading}\n\n{readme[heading]}\n" for heading in wanted)
    pages[name] = _relinked(f"# {title}\n\n" + "\n".join(parts))
  for name, source in _WHOLE.items():
    pages[name] = _relinked((ROOT / source).read_text())
  return pages


def _sections(text: str) -> dict[str, str]:
  """Heading -> text below it."""
  parts = re.split(r"^## (.+)\n", text, flags=re.M)[1:]
  return {h: t.strip() for h, t in zip(parts[::2], parts[1::2], strict=True)}


def _relinked(text: str) -> str:
  """Links to files of the checkout lead to their pages, or become code."""

  def page(match: re.Match) -> str:
    words, path = match[1], match[2]
    if re.match(r"\w+:|#", path):
      return match[0]
    for name, source in _WHOLE.items():
      if path == source:
        return f"[{words}]({name})"
    notebook = re.fullmatch(r"colabs/(\w+)\.(ipynb|py)", path)
    if notebook:
      return f"[{words}](notebooks/{notebook[1]}.md)"
    if re.fullmatch(r"docs/\w+\.md", path):
      return f"[{words}]({path.removeprefix('docs/')})"
    return words if "`" in words else f"`{path}`"

  return re.sub(r"\[([^\]\n]+)\]\(([^)\s]+)\)", page, text)
