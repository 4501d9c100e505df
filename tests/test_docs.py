"""The documentation site: whole, with a page for every public name, and no link that leads nowhere."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

import pytest

from ragkit.config import LSRConfig
from ragkit.dev import docs
from ragkit.dev.__main__ import main
from ragkit.settings import walk

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; CI keeps it where RAGKIT_SITE says."""
    pytest.importorskip("furo", reason="the extra docs is not installed")
    kept = os.environ.get("RAGKIT_SITE")
    out = Path(kept) if kept else tmp_path_factory.mktemp("docs") / "site"
    assert main(["docs", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_every_notebook_has_its_page_with_its_outputs(site):
    for path in NOTEBOOKS:
        text = (site / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", ()):
                for line in "".join(output.get("text", "")).splitlines():
                    words = [word for word in re.findall(r"[A-Za-z]{4,}", line)][:1]
                    assert all(word in text for word in words), f"{path.name}: {line}"


@pytest.mark.slow
def test_every_public_name_has_its_page(site):
    names = list(docs.public_names())
    assert {"RAGSystem", "LSRTrainer", "ConfigForm", "RunPanel", "loss_curves", "lsr_loss"} <= {n for _, _, n in names}
    for _, module, name in names:
        assert f"{module}.{name}" in (site / "api" / f"{module}.{name}.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_settings_of_a_class_are_listed_with_what_they_do(site):
    page = (site / "api" / "ragkit.LSRConfig.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub("<[^>]+>", "", page))
    for key, field, inner in walk(LSRConfig):
        if inner is None:
            words = re.search("[A-Za-z ]{3,}", field.description or "")  # quotes are set otherwise
            assert key in text and words is not None and words[0] in text, key


@pytest.mark.slow
def test_a_page_of_settings_is_their_table_with_the_defaults(site):
    page = (site / "api" / "ragkit.LSRConfig.html").read_text(encoding="utf-8")
    rows = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    table = [[html.unescape(re.sub("<[^>]+>", "", cell)).strip() for cell in row] for row in rows if row]
    defaults = {row[0]: row[1].split("; default: ")[1] for row in table}
    assert defaults["gamma"] == "0.05" and defaults["keep"] == "best" and defaults["refresh_steps"] == "null"
    assert defaults["train.batch_size"] == str(LSRConfig().train.batch_size)
    assert "Parameters" not in page  # a list of the same names with their types only


@pytest.mark.slow
def test_widgets_have_the_signature_that_they_are_called_with(site):
    for name, first in (("ConfigForm", "settings"), ("RunPanel", "source"), ("GraphView", "source")):
        page = (site / "api" / f"ragkit.widgets.{name}.html").read_text(encoding="utf-8")
        text = " ".join(html.unescape(re.sub("<[^>]+>", "", page)).split())
        assert f"class ragkit.widgets.{name}({first}" in text and "*args" not in text


@pytest.mark.slow
def test_what_stands_before_a_colon_in_a_property_is_not_taken_for_its_type(site):
    for page in (site / "api").glob("*.html"):
        assert "Type<span" not in page.read_text(encoding="utf-8"), page.name
    text = (site / "api" / "ragkit.widgets.RunPanel.html").read_text(encoding="utf-8")
    assert "The sentence shown to the person: what happened" in text


@pytest.mark.slow
def test_wide_code_can_be_scrolled_by_keyboard(site):
    for page in ("index.html", "notebooks/00_quickstart.html"):
        text = (site / page).read_text(encoding="utf-8")
        assert '<pre tabindex="0">' in text and "<pre>" not in text
    text = (site / "index.html").read_text(encoding="utf-8")
    assert '<div tabindex="0" class="table-wrapper' in text and '<div class="table-wrapper' not in text


@pytest.mark.slow
def test_search_knows_the_names(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8").lower()
    for word in ("lsrtrainer", "runpanel", "relational_conv", "quickstart"):
        assert word in index


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">x</a><a href="b.html#gone">x</a><a href="c.html">x</a><a href="https://x.org">x</a>'
        '<img src="p.png" alt="words"><img src="p.png" alt=""><h1 id="here"></h1><a href="#here">x</a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="there"></h1>')
    (tmp_path / "p.png").write_bytes(b"")
    assert docs.broken_links(tmp_path) == [
        "a.html: a picture without a text: p.png",
        "a.html: b.html#gone (no such place in that page)",
        "a.html: c.html",
    ]


def test_a_folder_that_is_no_site_is_not_replaced(tmp_path, capsys):
    pytest.importorskip("furo")
    (tmp_path / "mine.txt").write_text("x")
    assert main(["docs", "--out", str(tmp_path)]) == 1
    assert "no documentation" in capsys.readouterr().err and (tmp_path / "mine.txt").exists()
