"""The site builds from the package without a network; nothing is left out."""

import doctest
import functools
import html
import os
import pathlib
import re
import subprocess
import sys
import time
import tomllib
import urllib.parse
import zlib

import pytest

from isthmus.train import recipe
from tests.public import PATHS, module_name, parse, public

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
  "version"
]
# Sphinx as its command runs it, where every connection fails.
OFFLINE = """
import socket, sys
def refuse(self, address):
  raise OSError(f"the documentation asks for {address}")
socket.socket.connect = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


def _strays():
  """Files in docs/ that git would add."""
  names = subprocess.run(
    ["git", "ls-files", "--others", "--exclude-standard", "docs"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  return set(names.stdout.split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The folder of a fresh build; a warning fails it."""
  folder, strays = tmp_path_factory.mktemp("site"), _strays()
  began = time.monotonic()
  done = subprocess.run(
    [
      *(sys.executable, "-c", OFFLINE, "-W", "--keep-going", "-q"),
      # Without names of a page's functions beside it, and with one sidebar for
      # the pages of a folder: most of the build's time.
      *("-b", "html", "-D", "toc_object_entries=0", "-t", "quick"),
      *("-d", folder / "doctrees", DOCS, folder / "html"),
    ],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  seconds = time.monotonic() - began
  assert done.returncode == 0, done.stdout + done.stderr
  assert seconds < 480, f"the build took {seconds:.0f} s"
  assert _strays() == strays, "the build leaves files in the checkout"
  return folder / "html"


@pytest.mark.process
def test_every_public_name_has_its_entry(site):
  inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
  entries = {
    e.split()[0] for e in zlib.decompress(inventory).decode().splitlines()
  }
  missing = []
  for path in PATHS:
    names = [f"{module_name(path)}.{n.name}" for n in public(parse(path).body)]
    missing += [n for n in (module_name(path), *names) if n not in entries]
  assert not missing


def _text(page):
  """What a page says, without its spaces."""
  return re.sub(r"\s", "", html.unescape(re.sub(r"<[^>]+>", "", page)))


@pytest.mark.process
def test_signatures_stand_as_in_the_source(site):
  """Shapes and default functions, and no object's address."""
  page = (site / "reference" / "attention" / "sdpa.html").read_text()
  assert "q:Float[Array,'btnd']," in _text(page)
  page = (site / "reference" / "nets" / "transformer.html").read_text()
  assert "attend:Callable[...,Any]=attention," in _text(page)
  for page in (site / "reference").rglob("*.html"):
    assert not re.search(r"\bat 0x[0-9a-f]{6}", page.read_text()), page


@pytest.mark.process
def test_pages_load_nothing_from_elsewhere(site):
  pages = list(site.rglob("*.html"))
  assert len(pages) > 50
  for page in pages:
    for tag in re.findall(
      r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text()
    ):
      assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), tag
  for sheet in site.rglob("*.css"):
    text = sheet.read_text()
    assert not re.search(r"@import|url\(.?(?:https?:)?//", text), sheet


@pytest.mark.process
def test_links_within_the_site_lead_somewhere(site):
  """To a page, and to the place in it."""
  pages = {p: p.read_text() for p in site.rglob("*.html")}
  anchors = {p: set(re.findall(r'\bid="([^"]+)"', t)) for p, t in pages.items()}

  @functools.cache  # a sidebar's links are those of all pages beside it
  def file(folder, place):
    target = (folder / urllib.parse.unquote(place)).resolve()
    return target if target.is_file() else None

  broken = []
  for page, text in pages.items():
    for link in set(re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text)):
      if re.match(r"\w+:", link) or link == "#":
        continue
      place, _, anchor = link.partition("#")
      target = file(page.parent, place) if place else page
      found = target and (
        not anchor or target not in anchors or anchor in anchors[target]
      )
      if not found:
        broken.append(f"{page.relative_to(site)}: {link}")
  assert not broken


@pytest.mark.process
def test_gallery_shows_every_recipe(site):
  gallery = (site / "gallery.html").read_text()
  for name in recipe.recipe_names():
    assert f'href="recipes/{name}.html"' in gallery
    assert (site / "recipes" / f"{name}.html").is_file()
    plot = DOCS / "gallery" / f"{name}.png"
    assert (f"_images/{name}.png" in gallery) == plot.is_file()


@pytest.mark.process
def test_every_notebook_has_its_page(site):
  for path in (ROOT / "colabs").glob("*.py"):
    page = (site / "notebooks" / f"{path.stem}.html").read_text()
    assert "highlight-python" in page and "%%" not in page


def test_plots_are_small():
  for path in (DOCS / "gallery").glob("*"):
    assert path.suffix == ".png" and path.stem in recipe.recipe_names(), path
    assert path.stat().st_size <= 150_000, path


def test_first_look_runs():
  found = doctest.testfile(str(DOCS / "index.md"), module_relative=False)
  assert found.attempted == 7 and not found.failed


# --- citing ---


def _bibtex():
  """Entries by key, each as field -> text; refuses what it can't read."""
  text = (DOCS / "papers.bib").read_text()
  entries = {}
  for match in re.finditer(r"@(\w+)\{(\w+),\n(.*?)\n\}\n*", text, re.S):
    fields = {}
    for line in match[3].splitlines():
      field = re.fullmatch(r"  (\w+) = \{(.*)\},", line)
      assert field and field[2].count("{") == field[2].count("}"), line
      assert field[1] not in fields, line
      fields[field[1]] = field[2]
    assert match[2] not in entries, match[2]
    entries[match[2]] = fields
  rest = re.sub(r"@\w+\{\w+,\n.*?\n\}\n*", "", text, flags=re.S)
  assert not rest.strip(), rest
  return entries


def test_every_paper_has_its_entry():
  """Under the recipe's name, and of the paper that the recipe links."""
  found = {n: recipe.read(n) for n in recipe.recipe_names()}
  papers = {n: r for n, r in found.items() if r["Link"] != "none"}
  entries = _bibtex()
  assert entries.keys() == papers.keys()
  for name, one in papers.items():
    entry = entries[name]
    assert entry["url"] == one["Link"]
    assert entry["year"] == one["Year"]
    assert entry["title"] and entry["author"]
    if "arxiv.org" in entry["url"]:
      assert entry["eprint"] in entry["url"]


def test_citation_is_of_this_version():
  yaml = pytest.importorskip("yaml")
  found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  for field in ("cff-version", "message", "title", "authors"):
    assert found[field]
  assert found["version"] == VERSION
  assert found["license"] == "Apache-2.0"


def test_changelog_has_this_version():
  """On top, but for what is not released; versions descend."""
  text = (ROOT / "CHANGELOG.md").read_text()
  heads = re.findall(r"^## (.+)$", text, re.M)
  released = [h for h in heads if h != "Unreleased"]
  assert heads[0] in ("Unreleased", VERSION)
  assert released[0] == VERSION
  numbers = [tuple(map(int, h.split("."))) for h in released]
  assert numbers == sorted(numbers, reverse=True)


@pytest.mark.process
def test_pages_of_the_readme(site):
  """Its words, with links to the site's own pages."""
  page = (site / "install.html").read_text()
  assert "maketrain" in _text(page) and "<table" in page  # what it runs on
  assert 'href="notebooks/quickstart.html"' in page
  assert 'href="faults.html"' in (site / "library.html").read_text()
