"""report.html: the evidence of an evaluation as one page that needs no other file."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from lowtide.report import palette
from lowtide.report.evidence import Evidence, read
from lowtide.report.page import headline, pictures, sections
from lowtide.report.wording import ranges

MOST_BYTES = 5_000_000
# Shares of the room for images; the markup around them takes the rest.
_SHARES = (0.97, 0.7, 0.4, 0.1, 0)
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
    room = MOST_BYTES - len(_page(evidence, data, None))
    sheets = (pictures.sheet(evidence, round(share * room)) for share in _SHARES)
    pages = (_page(evidence, data, images) for images in sheets)
    page = next((page for page in pages if len(page) < MOST_BYTES), None)
    path = evidence.folder / "report.html"
    path.write_bytes(page or _page(evidence, data, None))
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
