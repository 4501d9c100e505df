"""Settings of the documentation site; `python -m ragkit.dev docs` puts its sources together and builds it."""

from __future__ import annotations

from ragkit import __version__

project = "ragkit"
author = "the ragkit authors"
copyright = author
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "index"
exclude_patterns = ["docs", "_build"]
nb_execution_mode = "off"  # outputs as committed: tests/test_notebooks.py proves them
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
default_role = "code"  # docstrings write `names` as Markdown does
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as one list, not as entries beside those of the class itself
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"

html_theme = "furo"  # light and dark, by the reader's own setting
html_title = "ragkit"
html_show_sourcelink = False
html_copy_source = False
suppress_warnings = ["ref.python"]  # one class may have a page under two names (ragkit.X and where it is written)


def setup(app):
    """Tables in docstrings stand as Markdown has them; reStructuredText shows them as they are."""

    def keep_tables(app, what, name, obj, options, lines):
        kept, inside = [], False
        for line in lines:
            row = line.lstrip().startswith("|")
            if row != inside:
                kept += ["", "::", ""] if row else [""]
            kept.append("    " + line.lstrip() if row else line)
            inside = row
        lines[:] = kept

    app.connect("autodoc-process-docstring", keep_tables, priority=900)  # after napoleon
