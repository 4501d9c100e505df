"""A picture says in words what it shows, in Jupyter, in a page and in a file."""

from __future__ import annotations

import base64
import io
import re
import threading
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from ragkit.plots import Plot, degree_distribution, histogram, loss_curves
from ragkit.plots.plot import BYTES
from ragkit.plots.style import drawing, figures, new_figure, one_line, shorten

SVG = "{http://www.w3.org/2000/svg}"
EVENTS = [{"step": i, "loss": 3 / i, "learning_rate": 0.1 / i} for i in range(1, 9)]


@pytest.fixture
def plot() -> Plot:
    return loss_curves({"a <b> & $c$": EVENTS, "other": EVENTS[:4]})


def test_jupyter_gets_the_picture_and_its_words(plot):
    formatter = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    data, metadata = formatter.format(plot)
    assert set(data) == {"image/png", "text/plain"}
    assert data["text/plain"] == plot.alt == repr(plot)
    assert base64.b64decode(data["image/png"]) == plot.png()
    assert metadata["image/png"] == {"alt": plot.alt, "width": 800, "height": 350}


def test_the_same_picture_has_the_same_bytes(plot):
    again = loss_curves({"a <b> & $c$": EVENTS, "other": EVENTS[:4]})
    assert plot.png() == again.png() == plot.png()
    assert plot.svg() == again.svg() == plot.svg()


def test_settings_of_the_session_change_nothing_and_are_left_alone(plot):
    matplotlib = pytest.importorskip("matplotlib")
    png, svg = plot.png(), plot.svg()
    with matplotlib.rc_context(
        {"axes.facecolor": "#000000", "text.color": "red", "font.size": 20, "lines.linewidth": 9}
    ):
        again = loss_curves({"a <b> & $c$": EVENTS, "other": EVENTS[:4]})
        assert again.png() == png and again.svg() == svg
        assert matplotlib.rcParams["font.size"] == 20


def test_a_png_has_the_ground_of_paper_and_is_small(plot):
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(plot.png()))
    assert image.size[0] in (800, 1000, 1200)
    assert min(image.convert("RGB").getpixel((1, 1))) >= 254
    rng = np.random.default_rng(0)
    noise = [{"step": i, "loss": float(v), "learning_rate": 1e-3} for i, v in enumerate(rng.random(500))]
    assert len(loss_curves(noise).png()) <= BYTES


def test_an_svg_takes_the_colours_of_its_page(plot):
    svg = plot.svg()
    assert svg.startswith("<svg") and "<?xml" not in svg and "<!DOCTYPE" not in svg
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label") == plot.alt
    assert root[0].tag == f"{SVG}title" and root[0].text == plot.title
    texts = list(root.iter(f"{SVG}text"))
    assert "a <b> & $c$" in ["".join(text.itertext()) for text in texts]
    for text in texts:
        assert "fill: var(--jp-ui-font-color1, currentColor)" in text.get("style", "")
    # Nothing is drawn in a fixed black or white: neither could be seen on every ground.
    for element in root.iter():
        look = " ".join([element.get("style", ""), element.get("fill", ""), element.get("stroke", "")])
        assert not re.search(r"#0{3,6}\b|black|#f{3}(f{3})?\b|white|#1a1b1c|#fffffe", look), look
    assert not any(element.tag == f"{SVG}metadata" for element in root.iter())


def _references(svg: str) -> set[str]:
    return set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))


def test_pictures_in_one_page_do_not_mix_their_ids(plot):
    bars = histogram({"a": [1.0, 2.0, 2.5], "b": [2.0, 3.0]})
    ids = []
    for picture in (plot, bars):
        svg = picture.svg()
        found = [element.get("id") for element in ET.fromstring(svg).iter() if element.get("id")]
        assert len(found) == len(set(found)) and set(found) == _references(svg)
        ids += found
    assert len(ids) == len(set(ids)) > 0
    assert all(name.startswith("second-") for name in _references(plot.svg("second-")))


def test_files(plot, tmp_path):
    assert plot.save(tmp_path / "loss.PNG").read_bytes() == plot.png()
    text = plot.save(str(tmp_path / "loss.svg")).read_text(encoding="utf-8")
    root = ET.fromstring(text.encode())
    assert text.startswith("<?xml") and root[1].get("style") == "fill: #ffffff" and "currentColor" not in text
    for name in ("loss.pdf", "loss"):
        with pytest.raises(ValueError, match=r"\.png or as \.svg"):
            plot.save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.PNG", "loss.svg"]


def test_html_describes_the_picture():
    plot = degree_distribution(type("G", (), {"entities": ['"<i>'], "head": np.array([0]), "tail": np.array([0])})())
    html = plot.html()
    root = ET.fromstring(html.replace('%">', '%"/>').removesuffix(">") + ("/>" if not html.endswith("/>") else ""))
    assert root.get("alt") == plot.alt and '"<i>' in plot.alt


def test_control_characters_and_unknown_letters_do_no_harm():
    with drawing():
        figure = new_figure()
        figure.text(0.5, 0.5, "寿司 $x_1")
    svg = Plot(figure, "words", "name").svg()
    assert "寿司 $x_1" in "".join(ET.fromstring(svg).itertext())
    labelled = histogram({"a\x00b\nc": [1.0, 2.0]})
    ET.fromstring(labelled.svg())
    labelled.png()


def test_threads_draw_the_same():
    """A panel draws in a thread, while a cell draws too."""
    expected = loss_curves(EVENTS).svg()
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(loss_curves(EVENTS).svg())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0, 2, "0"), (0.04567, 2, "0.046"), (0.5, 2, "0.50"), (0.999, 2, "1.0"), (12.34, 2, "12"), (1234, 2, "1,200"),
        (1234, 6, "1,234"), (-2.345, 3, "-2.35"), (0.0000212, 2, "2.1e-05"), (1.5e12, 2, "1.5e+12"), (100, 3, "100"),
        (0.1, 6, "0.1"), (10, 6, "10"), (1_000_000, 6, "1,000,000"), (9.99, 2, "10"), (99.9, 2, "100"),
        (float("nan"), 2, "not a number"), (float("-inf"), 2, "infinite"), (np.float32(0.25), 2, "0.25"),
    ],
)  # fmt: skip
def test_numbers_in_words(value, digits, text):
    assert figures(value, digits) == text


def test_names_are_shortened_where_they_are_alike():
    name = shorten("/people/person/place_of_birth/inverse", 20)
    assert len(name) == 20 and name.startswith("/peopl") and name.endswith("/inverse")
    assert one_line("a\n\tb\x00c ") == "a b c"
