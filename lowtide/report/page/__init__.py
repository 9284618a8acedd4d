"""report.html: the evidence of an evaluation as one page that needs no other file."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from lowtide.report import palette
from lowtide.report.evidence import Evidence, read
from lowtide.report.page import headline, pictures, sections
from lowtide.report.wording import ranges

MOST_BYTES = 5_000_000
_MARGIN = 100_000
_PAGE = Environment(
    loader=PackageLoader("lowtide.report.page"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_PAGE.filters["percentage"] = "{:.2%}".format


def draw(folder: Path) -> Path:
    """Draw DIR/evidence.json and DIR/images into DIR/report.html, under 5 MB in any case."""
    evidence = read(Path(folder))
    data = sections.drawn(evidence)
    empty = _page(evidence, data, None)
    images = pictures.sheet(evidence, MOST_BYTES - _MARGIN - len(empty))
    path = evidence.folder / "report.html"
    path.write_bytes(_page(evidence, data, images) if images else empty)
    return path


def _page(
    evidence: Evidence, data: dict[str, sections.Parts], images: pictures.Sheet | None
) -> bytes:
    modules = {"headline": headline, "pictures": pictures, "palette": palette}
    context = {"evidence": evidence, "data": data, "images": images}
    template = _PAGE.get_template("report.html")
    return template.render(modules | context, provenance=_provenance(evidence)).encode()


def _provenance(evidence: Evidence) -> dict[str, str]:
    """Environment and request in words, without what is empty."""
    request = {**evidence.request, "seeds": ranges(evidence.seeds)}
    entries = {**evidence.environment, **request, "date": evidence.date}
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in entries.items()
        if value not in (None, [], "")
    }
