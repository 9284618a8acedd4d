"""The palette of all plots: calm greys, series that differ in lightness, and one accent colour."""

INK = "#1b1f24"
QUIET = "#6a737d"
FAINT = "#a3abb2"
HAIR = "#d5dade"
ACCENT = "#0b6e99"
PAPER = "#ffffff"
SERIES = (INK, FAINT, "#5c94a0", QUIET, "#c4ccd1")

# Colours of report.html by the name of their CSS variable: on light paper and on dark paper.
PAGE = {
    "paper": ("#fcfcfa", "#101417"),
    "ink": (INK, "#e7e9ea"),
    "quiet": ("#5b646c", "#9aa4ac"),
    "hair": ("#dfe3e4", "#2a3137"),
    "wash": ("#f2f4f2", "#181d21"),
    "bad": ("#b3261e", "#ff9a8d"),
    "s1": (ACCENT, "#63b9da"),
    "s2": ("#bd4a05", "#f2935a"),
    "s3": ("#8e4585", "#d595cf"),
    "s4": ("#1d7a5f", "#62c7a4"),
    "s5": ("#8a5a00", "#e0b84d"),
    "s6": ("#3c4650", "#c3cad0"),
}
# The dashes of the lines in the colours s1 to s6: lengths of dash and gap, in widths of the line.
DASHES = ((), (5, 2), (1, 1.5), (6, 2, 1, 2), (9, 3), (2, 2))
LINE_WIDTH = 2.2
# The ramps of errors, on light and on dark paper, each from the paper to the worst error. They
# change in lightness alone, so they read without colour.
RAMPS = {
    "light": ("#f0f3f1", "#c3dbdc", "#7fb6c4", "#3b88a8", "#1c5683", "#101a40"),
    "dark": ("#182126", "#1b3e50", "#27657f", "#4691a9", "#8cc3cc", "#f2f6ea"),
}
