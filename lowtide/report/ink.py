"""The palette of the plots, the same as that of the grids: calm greys, and one accent for what the picture is about."""

INK, QUIET, FAINT, HAIR, ACCENT = "#1b1f24", "#6a737d", "#a3abb2", "#d5dade", "#0b6e99"
SERIES = (INK, FAINT, "#5c94a0", QUIET, "#c4ccd1")
