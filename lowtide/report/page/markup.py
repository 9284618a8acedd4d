"""HTML that escapes what it is given, and numbers the way people read them."""

import json
import math
import re
from collections.abc import Iterable
from html import escape
from typing import Any

VOID = {"img", "input", "br"}
NOTHING = "–"


class Html(str):
    """Text that is markup already and is not escaped again."""


Child = str | None


def safe(child: Child) -> str:
    return "" if child is None else child if isinstance(child, Html) else escape(str(child))


def join(parts: Iterable[Child], between: str = "") -> Html:
    return Html(between.join(safe(part) for part in parts))


def attribute(name: str, value: Any) -> str:
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def tag(element: str, /, *children: Child, **attributes: Any) -> Html:
    """One element: `class_` is class, `data_x` is data-x; an attribute that is None or False is left out."""
    given = "".join(attribute(name, value) for name, value in attributes.items() if value is not None and value is not False)
    return Html(f"<{element}{given}>" if element in VOID else f"<{element}{given}>{join(children)}</{element}>")


def unseen(text: str) -> Html:
    """For a screen reader alone."""
    return tag("span", text, class_="unseen")


def script(data: Any) -> Html:
    """Numbers for the page's script: strict JSON that no text inside can end early."""
    text = json.dumps(finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Html(f'<script type="application/json">{text.replace("<", chr(92) + "u003c")}</script>')


def finite(data: Any) -> Any:
    if isinstance(data, float):
        return float(f"{data:.3g}") if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    return [finite(each) for each in data] if isinstance(data, list | tuple) else data


def figures(value: float, digits: int = 3) -> str:
    """Three significant figures, no exponent where the number can be read without."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else NOTHING
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if power < -4 or power > 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}·10{superscript(int(exponent))}"
    return f"{value:,.{max(0, digits - 1 - power)}f}"


def superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def size(count: float) -> str:
    for least, unit, name in ((1e9, 1e9, "GB"), (1e5, 1e6, "MB"), (100, 1e3, "kB")):
        if count >= least:
            return f"{figures(count / unit)} {name}"
    return f"{count:.0f} bytes"


def brief(text: str) -> str:
    """5.00 MB -> 5 MB: what is round, as a tick is."""
    return re.sub(r"(\.\d*?)0+(?!\d)", r"\1", text).replace(". ", " ").rstrip(".")


def seconds(value: float) -> str:
    return f"{figures(value)} s" if value >= 1 else f"{figures(value * 1e3)} ms"


def lasting(value: float) -> str:
    """A stretch of time in words."""
    if value < 60:
        return f"{figures(value, 2 if value < 10 else 3)} s" if value < 59.95 else "1 min"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if rest else f"{minutes} min"


def times(ratio: float) -> str:
    return f"{figures(ratio, 2 if ratio < 10 else 3)}×"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"


def counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
