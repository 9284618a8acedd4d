"""One typeface and one palette for every picture: calm greys, and one accent for what the picture is about."""

from functools import cache
from pathlib import Path

import matplotlib
from PIL import ImageFont

PAPER, INK, QUIET, FAINT, HAIR = "#ffffff", "#1b2126", "#68727b", "#a3abb2", "#dfe3e6"
ACCENT = "#0b7285"
SERIES = (INK, FAINT, "#5c94a0", QUIET, "#c4ccd1")


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, the one typeface that comes with matplotlib and so is on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
