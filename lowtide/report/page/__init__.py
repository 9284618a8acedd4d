"""report.html: the evidence of a comparison as one page that needs no other file."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined

from lowtide.report import palette
from lowtide.report.evidence import Evidence, read
from lowtide.report.page import headline, parts, pictures, sections
from lowtide.report.wording import day, figures, ranges, size

NAME = "report.html"
MOST_BYTES = pictures.MOST_BYTES
_PAGE = Environment(
    loader=PackageLoader("lowtide.report.page"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_PAGE.filters |= {"percentage": "{:.2%}".format, "day": day, "figures": figures}
_PAGE.filters |= {"size": size}
_PAGE.filters |= {"swatch": parts.swatch, "channels": parts.channels}
_PAGE.globals |= {"headline": headline, "palette": palette}


def draw(folder: Path) -> Path:
    """Draw DIR/evidence.json and DIR/images into DIR/report.html, under 5 MB in any case."""
    evidence = read(folder)
    data = sections.drawn(evidence)
    pages = (_page(evidence, data, images) for images in pictures.sheets(evidence, folder))
    page = next((page for page in pages if len(page) < MOST_BYTES), None)
    path = folder / NAME
    path.write_bytes(page or _page(evidence, data, None))
    return path


def exhibit_page(facts: Mapping[str, object]) -> bytes:
    """The page of `lowtide serve`; `facts` says which models there are and what can be asked."""
    return _PAGE.get_template("exhibit.html").render(facts=facts).encode()


def _page(evidence: Evidence, data: Mapping[str, object], images: pictures.Sheet | None) -> bytes:
    context = {"evidence": evidence, "data": data, "images": images}
    return _PAGE.get_template(NAME).render(context, provenance=_provenance(evidence)).encode()


def _provenance(evidence: Evidence) -> dict[str, str]:
    """Environment and request in words, without what is empty."""
    entries = {**msgspec.to_builtins(evidence.environment), **msgspec.to_builtins(evidence.request)}
    entries |= {"seeds": ranges(evidence.request.seeds), "date": evidence.date}
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for name, value in entries.items()
        if value not in (None, [], (), "")
    }
