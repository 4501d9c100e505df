"""A picture with its description in words."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from ragkit.files import atomic_write_text
from ragkit.optional import require
from ragkit.plots.palette import palette_png
from ragkit.plots.style import drawing, one_line
from ragkit.plots.svg import finish

DPI = 100  # pixels an inch in a page
SHARP = (1.5, 1.25, 1.0)  # pixels of the PNG for each of them, for screens with small pixels: the most that fits into
BYTES = 25_000  # of a PNG; a notebook holds several, and is 200 kB at most
SUFFIXES = (".png", ".svg")


class Plot:
    """A picture that shows itself in Jupyter, and says in words what it shows.

    In a notebook the output holds the PNG, with `alt` in its metadata, and `alt` as text: a notebook test compares
    that text, so the numbers of the picture are proven, though no two machines draw the same pixels.

    Attributes:
        figure: The matplotlib `Figure`, without pyplot state; its layout is fixed.
        alt: One or two sentences with the numbers that matter, to 2 or 3 digits.
        title: The name of the picture.

    Example:
        >>> plot = loss_curves({"run": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]})  # doctest: +SKIP
        >>> plot.save("loss.svg")  # doctest: +SKIP
    """

    def __init__(self, figure: Any, alt: str, title: str) -> None:
        self.figure, self.alt, self.title = figure, one_line(alt), one_line(title)
        with drawing():
            # Laid out once and for all: matplotlib moves the axes a little at each further drawing, and the same
            # picture would have other bytes each time.
            for _ in range(2):  # the ticks of the first pass are those of axes of another size
                figure.draw_without_rendering()
            figure.set_layout_engine("none")

    def __repr__(self) -> str:
        return self.alt

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        width, height = self.size
        picture = base64.b64encode(self.png()).decode("ascii")
        about = {"alt": self.alt, "width": width, "height": height}
        return {"image/png": picture, "text/plain": self.alt}, {"image/png": about}

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in the page, in pixels."""
        width, height = self.figure.get_size_inches()
        return round(width * DPI), round(height * DPI)

    def png(self, dpi: float | None = None) -> bytes:
        """The picture on white ground, with a palette of few colours.

        Args:
            dpi: Pixels an inch; None: 150, or fewer (at least 100) where that would take more than 25 kB.
        """
        if dpi is not None:
            return self._png(dpi)
        for sharp in SHARP:
            data = self._png(DPI * sharp)
            if len(data) <= BYTES:
                break
        return data

    def _png(self, dpi: float) -> bytes:
        image = require("PIL.Image", extra="notebooks", package="pillow")
        canvas = require("matplotlib.backends.backend_agg").FigureCanvasAgg(self.figure)
        before = self.figure.dpi
        try:
            with drawing():
                self.figure.set_dpi(dpi)
                canvas.draw()
                size = canvas.get_width_height(physical=True)
                pixels = image.frombytes("RGBA", size, bytes(canvas.buffer_rgba())).convert("RGB")
        finally:
            self.figure.set_dpi(before)
        return palette_png(pixels, dpi=(dpi, dpi))

    def svg(self, prefix: str | None = None) -> str:
        """The picture to stand within a page: an `<svg>` element without XML head.

        Text and axes take the page's colours, so that it can be read on light and on dark ground. A screen reader
        reads `alt`. Its text is text; it needs nothing from outside.

        Args:
            prefix: Of its ids; None: made of the content. Give one where the same picture stands twice in a page.
        """
        return self._svg(True, prefix)

    def _svg(self, themed: bool, prefix: str | None = None) -> str:
        file = io.BytesIO()
        with drawing():
            self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return finish(file.getvalue(), self.alt, self.title, themed, prefix)

    def html(self) -> str:
        """An `<img>` with the PNG inside, and `alt`: for places that take no SVG."""
        width, height = self.size
        data = base64.b64encode(self.png()).decode("ascii")
        return (
            f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
            f'style="max-width:100%;height:auto" alt="{html.escape(self.alt)}">'
        )

    def save(self, path: str | Path) -> Path:
        """Writes the picture, on white ground.

        Args:
            path: Ends in .png or .svg, which chooses the format; an existing file is replaced.

        Returns:
            The path.

        Raises:
            ValueError: Another ending.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise ValueError(f"{path}: the ending is {suffix or 'missing'}; a picture is saved as .png or as .svg")
        if suffix == ".svg":
            atomic_write_text(path, '<?xml version="1.0" encoding="UTF-8"?>\n' + self._svg(False) + "\n")
        else:
            path.write_bytes(self.png())
        return path
