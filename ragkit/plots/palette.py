"""PNG files of few bytes, for notebooks that hold several."""

from __future__ import annotations

import io
from typing import Any

from ragkit.optional import require

COLORS = 64  # a picture of lines, bars and boxes needs no more, and takes a third of the bytes


def palette_png(pixels: Any, **options: Any) -> bytes:
    """A PNG with a palette.

    Args:
        pixels: The picture, a PIL image in RGB.
        **options: As PIL's `save` takes them.
    """
    image = require("PIL.Image", extra="notebooks", package="pillow")
    small = pixels.quantize(COLORS, method=image.Quantize.MEDIANCUT, dither=image.Dither.NONE)
    file = io.BytesIO()
    small.save(file, format="png", optimize=True, **options)
    return file.getvalue()
