"""matplotlib's SVG made fit to stand in a page: the page's colours, a description, ids of its own, few bytes."""

from __future__ import annotations

import hashlib
import re
import xml.etree.ElementTree as ET

from ragkit.plots.fonts import page_fonts
from ragkit.plots.style import FAINT, GROUND, INK

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# JupyterLab's own colours where there are some, else those of the text around the picture.
THEME = {
    INK: "var(--jp-ui-font-color1, currentColor)",
    FAINT: "var(--jp-border-color0, #888)",
    GROUND: "none",
}
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # may not stand in XML
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_REFERENCE = re.compile(r"#([A-Za-z_][\w.-]*)")


def finish(raw: bytes, alt: str, title: str, themed: bool, prefix: str | None = None) -> str:
    """The SVG of a picture.

    Args:
        raw: What matplotlib wrote, with text as text.
        alt: The description for screen readers.
        title: The name of the picture, which browsers show as a tooltip.
        themed: Text, axes and hatches take the page's colours and the ground is see-through; else ink on white.
        prefix: Put before the ids; None: made of the content, so that two pictures on one page do not mix theirs.
    """
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(_CONTROL.sub(b"", raw))
    for child in list(root):
        if child.tag == f"{{{SVG}}}metadata":
            root.remove(child)
    prefix = f"p{hashlib.sha256(raw).hexdigest()[:8]}-" if prefix is None else prefix
    _rename_ids(root, prefix)
    _drop_ground(root, themed)
    for element in root.iter():
        for name in ("d", "transform", "x", "y", "style", "width", "height"):
            if name in element.attrib and element is not root:
                element.set(name, _NUMBER.sub(lambda found: f"{float(found.group()):.2f}", element.attrib[name]))
        style = element.get("style")
        if style is not None:
            element.set("style", _styled(style, themed))
        if themed:
            for name in ("fill", "stroke"):
                if element.get(name) in THEME:
                    element.set("style", f"{name}: {THEME[element.attrib.pop(name)]}; {element.get('style', '')}")
    root.set("role", "img")
    root.set("aria-label", alt)
    root.set("style", "max-width:100%;height:auto")
    heading = ET.Element(f"{{{SVG}}}title")
    heading.text = title
    root.insert(0, heading)
    return re.sub(r">\s+<", "><", ET.tostring(root, encoding="unicode"))


def _styled(style: str, themed: bool) -> str:
    style = page_fonts(style)
    if themed:
        for color, theirs in THEME.items():
            style = style.replace(color, theirs)
    return style


def _rename_ids(root: ET.Element, prefix: str) -> None:
    """Ids that are used get short names in order; the others go."""
    used: dict[str, str] = {}
    for element in root.iter():
        for value in element.attrib.values():
            for name in _REFERENCE.findall(value) if "url(" in value or value.startswith("#") else ():
                used.setdefault(name, f"{prefix}{len(used)}")
    for element in root.iter():
        if "id" in element.attrib:
            new = used.get(element.attrib.pop("id"))
            if new is not None:
                element.set("id", new)
        for key, value in element.attrib.items():
            if "url(" in value or (value.startswith("#") and key.endswith("href")):
                element.set(key, _REFERENCE.sub(lambda found: f"#{used.get(found.group(1), found.group(1))}", value))


def _drop_ground(root: ET.Element, themed: bool) -> None:
    """Takes away the figure's rectangle; a picture that stands alone gets a white one behind everything."""
    for group in root.iter(f"{{{SVG}}}g"):
        for child in list(group):
            if child.tag == f"{{{SVG}}}g" and len(child) == 1 and _is_ground(child[0]):
                group.remove(child)
    if not themed:
        ground = ET.Element(f"{{{SVG}}}rect", {"width": "100%", "height": "100%", "style": "fill: #ffffff"})
        root.insert(0, ground)


def _is_ground(element: ET.Element) -> bool:
    """Whether it is the rectangle of the figure: no clip path, no line, the colour of the ground."""
    style = element.get("style", "").replace(" ", "")
    return element.tag == f"{{{SVG}}}path" and style == f"fill:{GROUND}" and "clip-path" not in element.attrib
