"""Settings of the documentation site; `python -m ragkit.dev docs` puts its sources together and builds it."""

from __future__ import annotations

import importlib
import inspect

from docutils import nodes
from sphinx.util.inspect import stringify_signature

from ragkit import __version__
from ragkit.settings import Config

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


def keep_tables(app, what, name, obj, options, lines):
    """Tables in docstrings stand as Markdown has them; reStructuredText shows them as they are."""
    kept, inside = [], False
    for line in lines:
        row = line.lstrip().startswith("|")
        if row != inside:
            kept += ["", "::", ""] if row else [""]
        kept.append("    " + line.lstrip() if row else line)
        inside = row
    lines[:] = kept


def keep_sentences(app, what, name, obj, options, lines):
    """Napoleon takes what stands before a colon in a property's first line for its type; here that is a comment."""
    if what == "property":
        lines[:0] = ["..", ""]


def own_signature(app, what, name, obj, options, signature, returns):
    """A widget is called as its `__init__` says; the base of all widgets hides that behind a `__new__`."""
    if what == "class" and signature == "(*args, **kwargs)" and "__init__" in vars(obj):
        made = inspect.signature(obj.__init__)
        named = made.replace(parameters=list(made.parameters.values())[1:])
        return stringify_signature(named, show_annotation=False), returns
    return None


def drop_bare_types(app, domain, objtype, content):
    """A class of settings has a table of them; a list of their types alone, put before it, says nothing more."""
    if domain != "py" or objtype != "class":
        return
    signature = content.parent[0]
    made = getattr(importlib.import_module(signature["module"]), signature["fullname"], None)
    if inspect.isclass(made) and issubclass(made, Config) and made.model_fields:
        for fields in list(content.findall(nodes.field_list)):
            fields.parent.remove(fields)


def reach_by_keyboard(app, page, template, context, doctree):
    """Code, outputs and tables that are wider than the page can be scrolled with the arrow keys, too."""
    if "body" in context:
        body = context["body"].replace("<pre>", '<pre tabindex="0">')
        context["body"] = body.replace('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper')


def setup(app):
    app.connect("autodoc-process-docstring", keep_sentences, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", keep_tables, priority=900)  # after napoleon
    app.connect("autodoc-process-signature", own_signature)
    app.connect("object-description-transform", drop_bare_types, priority=900)  # after the types are put in
    app.connect("html-page-context", reach_by_keyboard)
