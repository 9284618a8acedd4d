"""Numbers the way people read them: significant figures, sizes, durations, ratios and counts."""

import math
import re
from collections.abc import Sequence
from datetime import datetime

NOTHING = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_YEAR = 365 * 86_400
_METRICS = {
    "psnr": "PSNR, dB",
    "latent_mse": "Latent MSE",
    "sfid": "sFID",
    "is": "Inception score",
    "precision": "Precision",
    "recall": "Recall",
    "clip": "CLIP score",
    "fd-efficientnet": "FD (EfficientNet)",
    **{name: name.upper() for name in ("ssim", "lpips", "fid", "kid")},
}


def figures(value: float, digits: int = 3) -> str:
    """Three significant figures, with an exponent only where the number is hard to read without."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else NOTHING
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if power < -4 or power > 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return f"{value:,.{max(0, digits - 1 - power)}f}"


def size(count: float) -> str:
    """661340 -> 0.661 MB"""
    for least, unit, name in ((1e9, 1e9, "GB"), (1e5, 1e6, "MB"), (100, 1e3, "kB")):
        if count >= least:
            return f"{figures(count / unit)} {name}"
    return f"{count:.0f} bytes"


def brief(text: str) -> str:
    """5.00 MB -> 5 MB: without trailing zeros, for ticks and limits."""
    return re.sub(r"(\.\d*?)0+(?!\d)", r"\1", text).replace(". ", " ").rstrip(".")


def seconds(value: float) -> str:
    """0.0213 -> 21.3 ms"""
    return f"{figures(value)} s" if value >= 1 else f"{figures(value * 1e3)} ms"


def lasting(value: float) -> str:
    """A duration in the units that a person uses: 61.7 -> 1 min 2 s"""
    if value < 59.95:
        return f"{figures(value, 2 if value < 10 else 3)} s"
    if value >= 2 * _YEAR:
        return f"{value / _YEAR:,.0f} years"
    if value >= 2 * 86_400:
        return f"{value / 86_400:.1f} days"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s".removesuffix(" 0 s")


def times(ratio: float) -> str:
    """6.73 -> 6.7×"""
    return f"{figures(ratio, 2 if ratio < 10 else 3)}×"


def percent(share: float) -> str:
    """0.021 -> 2.1 %"""
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"


def counted(number: int, noun: str) -> str:
    """2, seed -> 2 seeds"""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def metric_name(name: str) -> str:
    """psnr -> PSNR, dB"""
    return _METRICS.get(name, name)


def part_name(name: str) -> str:
    """The part of the network that holds a layer or unit: down 1, mid, up 0, time, block 12."""
    if name.startswith(("temporal:", "time_")):
        return "time"
    match = re.match(r"([A-Za-z_]+?)(?:_?blocks?|s)?(?:\.(\d+))?(?:\.|$)", name)
    if not match:
        return name.split(".")[0]
    stem = match[1].replace("conv_", "").replace("_", " ")
    return f"{stem} {match[2]}" if match[2] else stem


def ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 3, 8 -> 0-3, 8, as the command line takes them."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def day(date: str) -> str:
    """2026-11-21T08:14:00+00:00 -> 21 November 2026"""
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return date
    return f"{moment.day} {moment:%B %Y}"
