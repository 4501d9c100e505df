"""The documentation site: README, the notebooks as they are stored, and a page for every public name."""

from __future__ import annotations

import html.parser
import importlib
import inspect
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ragkit.dev.execute import NOTEBOOKS, ROOT, repository
from ragkit.optional import require
from ragkit.setting_types import expectation, unit_of
from ragkit.settings import Config, default_of, walk, yaml_value

# Chapter -> modules whose public names (`__all__`) have a page each; or (module, names).
CHAPTERS: dict[str, list[str | tuple[str, list[str]]]] = {
    "Systems, trainings, evaluation": ["ragkit"],
    "Forms, panel, pictures": ["ragkit.widgets", "ragkit.plots"],
    "Settings": [
        "ragkit.config",
        ("ragkit.presets", ["preset"]),
        ("ragkit.run_text", ["as_python", "as_command"]),
        ("ragkit.commands", ["run"]),
        ("ragkit.estimate", ["estimate"]),
    ],
    "Graph models": ["ragkit.gfm"],
    "Kernels": [
        "ragkit_kernels.relational_conv",
        "ragkit_kernels.linear_logprob",
        "ragkit_kernels.lsr_loss",
    ],
}
MODULES = ["ragkit.compat.fedrag", "ragkit.compat.gfmrag", "ragkit.federated"]  # one page each


class DocsError(RuntimeError):
    """The site cannot be built, or is not whole."""


def public_names() -> Iterator[tuple[str, str, str]]:
    """(chapter, module, name) of everything that has a page; each object once."""
    seen: set[int] = set()
    for chapter, modules in CHAPTERS.items():
        for entry in modules:
            module, names = entry if isinstance(entry, tuple) else (entry, None)
            loaded = importlib.import_module(module)
            for name in names if names is not None else loaded.__all__:
                value = getattr(loaded, name)
                documented = inspect.isclass(value) or inspect.isroutine(value)
                if documented and id(value) not in seen:
                    seen.add(id(value))
                    yield chapter, module, name


def build(out: Path) -> Path:
    """Builds the site; every warning is an error, and every link inside it must lead somewhere.

    Args:
        out: Folder of the HTML pages; made, or made anew.

    Returns:
        The first page.

    Raises:
        DocsError: Sphinx warns, or a link is broken.
    """
    require("sphinx", extra="docs")
    if out.exists() and any(out.iterdir()) and not (out / ".buildinfo").is_file():
        raise DocsError(f"{out} is there, and is no documentation built before; choose another folder")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        put_together(source)
        command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going"]
        command += ["-c", str(NOTEBOOKS / "docs"), "-d", f"{folder}/trees", str(source), str(Path(folder) / "html")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise DocsError(f"Sphinx is not content:\n{done.stderr[-6000:]}")
        broken = broken_links(Path(folder) / "html")
        if broken:
            raise DocsError("links that lead nowhere:\n  " + "\n  ".join(broken))
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(Path(folder) / "html", out)
    return out / "index.html"


# ---- the sources ----


def put_together(source: Path) -> None:
    """Copies and writes what Sphinx reads.

    Args:
        source: A folder that is made.
    """
    (source / "notebooks").mkdir(parents=True)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8").replace("](../README.md", "](../index.md")
        (source / "notebooks" / path.name).write_text(text, encoding="utf-8")
    shutil.copytree(NOTEBOOKS / "images", source / "notebooks" / "images")
    card = Path("ragkit/small_world/lm/README.md")
    (source / card).parent.mkdir(parents=True)
    shutil.copy(ROOT / card, source / card)
    pages = _api_pages(source / "api")
    (source / "index.md").write_text(_index(pages), encoding="utf-8")


def _index(pages: dict[str, list[str]]) -> str:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    notebooks = [f"notebooks/{path.stem}" for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    parts = [readme, f"\n[The code](https://github.com/{repository()})\n", _toctree("Notebooks", notebooks)]
    parts += [_toctree(chapter, [f"api/{page}" for page in names]) for chapter, names in pages.items()]
    parts.append(_toctree("More", ["ragkit/small_world/lm/README"]))
    return "\n".join(parts)


def _toctree(caption: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


def _api_pages(folder: Path) -> dict[str, list[str]]:
    """Writes a page for each name; chapter -> names of the pages."""
    folder.mkdir()
    pages: dict[str, list[str]] = {}
    for chapter, module, name in public_names():
        page = f"{module}.{name}"
        value = getattr(importlib.import_module(module), name)
        (folder / f"{page}.rst").write_text(_page(page, name, value), encoding="utf-8")
        pages.setdefault(chapter, []).append(page)
    for module in MODULES:
        title = f"{module}\n{'=' * len(module)}\n\n"
        text = f"{title}.. automodule:: {module}\n   :members:\n   :imported-members:\n"
        (folder / f"{module}.rst").write_text(text, encoding="utf-8")
        pages.setdefault("Other kits, federated", []).append(module)
    return pages


def _page(page: str, name: str, value: Any) -> str:
    lines = [name, "=" * len(name), ""]
    if inspect.isclass(value) and issubclass(value, Config) and value.model_fields:
        return "\n".join([*lines, f".. autoclass:: {page}", "   :no-members:", "", *_settings_table(value)])
    if inspect.isclass(value):
        lines += [f".. autoclass:: {page}", "   :members:"]
    else:
        lines.append(f".. autofunction:: {page}")
    return "\n".join([*lines, ""])


def _settings_table(cls: type[Config]) -> list[str]:
    """All settings of a class, groups included, as a list table: what forms and `--help` show too."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
    rows = [("setting", "takes", "what it does")]
    for key, field, inner in walk(cls):
        if inner is None:
            unit = unit_of(field)
            takes = expectation(field, with_unit=False) + (f" ({unit})" if unit else "")
            takes += f"; default: {yaml_value(default_of(cls, key))}"
            rows.append((f"``{key}``", _plain(takes), _plain(field.description or "")))
    for row in rows:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return [*lines, ""]


def _plain(text: str) -> str:
    """Words as they stand: none of their signs is markup."""
    return "".join("\\" + c if c in "\\*`|_<>" else c for c in text)


# ---- links ----


class _Page(html.parser.HTMLParser):
    """What a page can be linked at, where its links go, and pictures without a text in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.silent: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.update(filter(None, [values.get("id"), values.get("name") if tag == "a" else None]))
        target = values.get("href") if tag in ("a", "link") else values.get("src")
        if target:
            self.links.append(target)
        if tag == "img" and not (values.get("alt") or "").strip():
            self.silent.append(values.get("src") or "?")


def broken_links(folder: Path) -> list[str]:
    """Links of a site to its own pages, anchors, pictures and files that lead nowhere, and pictures without a text."""
    pages: dict[Path, _Page] = {}
    for path in sorted(folder.rglob("*.html")):
        pages[path] = _Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    found = []
    for path, page in pages.items():
        here = path.relative_to(folder)
        found += [f"{here}: a picture without a text: {source[:60]}" for source in page.silent]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or "_modules" in here.parts:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{here}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{here}: {link} (no such place in that page)")
    return sorted(set(found))


__all__ = ["CHAPTERS", "DocsError", "broken_links", "build", "public_names", "put_together"]
