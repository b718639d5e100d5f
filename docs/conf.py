"""Sphinx's settings: `make docs`."""

import pathlib
import sys
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import docstrings  # noqa: E402
import pages  # noqa: E402
import signatures  # noqa: E402

project = "isthmus"
author = "The isthmus authors"
copyright = "the isthmus authors, Apache-2.0"
release = version = tomllib.loads((HERE.parent / "pyproject.toml").read_text())[
  "project"
]["version"]

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
]
viewcode_follow_imported_members = False
exclude_patterns = ["_build", "gallery"]
add_module_names = False
python_use_unqualified_type_names = True
html_theme = "furo"
html_title = f"isthmus {release}"
html_show_sphinx = False
html_copy_source = False
python_maximum_signature_line_length = 60
highlight_language = "python"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_docstring_signature = False
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
# Attributes of a dataclass or a Linen module are what it is built of.
napoleon_custom_sections = [
  ("Attributes", "params_style"),
  ("Reference", "References"),
]


def _share_trees(app, name, template, context, doctree):
  """Pages of source are in no tree: those of one depth have the same sidebar.

  Half of all pages are such ones, and of most of them the sidebar is the work.
  With `-t quick`, for tests, all pages of a folder have that of its first: the
  same links, but what is marked as the page one reads.
  """
  del template, doctree
  if name.startswith("_modules/"):
    place = name.count("/")
  elif app.tags.has("quick"):
    place = name.rpartition("/")[0]
  else:
    return
  make = context["toctree"]

  def toctree(**settings):
    key = place, *sorted(settings.items())
    if key not in _TREES:
      _TREES[key] = make(**settings)
    return _TREES[key]

  context["toctree"] = toctree


_TREES: dict = {}


def setup(app):
  app.connect("html-page-context", _share_trees, priority=100)
  app.connect("builder-inited", lambda app: pages.write(), priority=1)
  app.connect("autodoc-process-signature", signatures.process_signature)
  app.connect(
    "autodoc-process-docstring", docstrings.process_docstring, priority=1
  )
