"""report.html: the evidence of an evaluation as one page that needs nothing but itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from lowtide.report.page import drift, making, numbers, pictures
from lowtide.report.page.evidence import Evidence, read
from lowtide.report.page.headline import headline
from lowtide.report.page.markup import Html, counted, join, tag

MOST_BYTES = 5_000_000
IMAGE_BUDGETS = (3_600_000, 1_800_000, 600_000, 100_000)


@dataclass(frozen=True)
class Section:
    """A heading, how to read what stands beside it, and what to say if the evidence lacks it."""

    anchor: str
    title: str
    note: str
    draw: Callable[[Evidence], Html | None]
    absent: str


SECTIONS = (
    Section(
        "metrics",
        "In numbers",
        "The best quantized model of each row in bold; where intervals overlap, the order may be chance.",
        numbers.table,
        "metrics were not measured",
    ),
    Section(
        "pareto",
        "Size against likeness",
        "Up and to the left is better. The shaded stairs rise at the models that no other beats in both; whiskers are intervals.",
        numbers.pareto,
        "without PSNR there is nothing to set against size",
    ),
    Section(
        "trajectory",
        "Along the trajectory",
        "How far the sample has drifted from the float model’s, from the same noise, after each step.",
        drift.trajectory,
        "the trajectory was not recorded",
    ),
    Section(
        "layers",
        "Layer by layer",
        "The error of each layer’s output when float and quantized model see the same input. Layers in forward order from left "
        "to right, timesteps from noise, at the top, to image.",
        drift.layers,
        "errors by layer were not recorded",
    ),
    Section(
        "temporal",
        "The sense of time",
        "How far what the network is told about the time has moved: the mean over all temporal features, then each by itself.",
        drift.temporal,
        "there are no temporal features that depend on the timestep alone, or they were not recorded",
    ),
    Section(
        "bits",
        "Bits per layer",
        "Each bar is a layer in forward order: as wide as it has parameters, as high as its weights have bits. "
        "The line across stands at the bits of its inputs.",
        making.bits,
        "bits by layer are unknown",
    ),
    Section("time", "Where the time went", "What each stage of quantizing took.", making.time, "quantizing was not timed"),
    Section(
        "predicted",
        "Predicted against real",
        "What lowtide plan said before the run, and what it came to. The mark stands in the middle where the two agree, "
        "at the ends where they are four times apart.",
        making.foretold,
        "nothing was predicted",
    ),
    Section(
        "float",
        "Left in float",
        "What was not quantized, and why.",
        making.left,
        "nothing was left in float, or it was not recorded",
    ),
)


def draw(folder: Path) -> Path:
    """Draw DIR/evidence.json and DIR/images into DIR/report.html, under 5 MB whatever the images weigh."""
    evidence = read(Path(folder))
    pages = (whole(evidence, budget) for budget in IMAGE_BUDGETS)
    page = next((page for page in pages if len(page) < MOST_BYTES), None)
    path = evidence.folder / "report.html"
    path.write_bytes(page or whole(evidence, 0))
    return path


def whole(evidence: Evidence, budget: int) -> bytes:
    images = pictures.sheet(evidence, budget)
    drawn = [(section, section.draw(evidence)) for section in SECTIONS]
    parts = [
        headline(evidence),
        block("images", "Same noise, same seed", images_note(evidence), pictures.section(evidence, images)) if images else None,
        *(block(section.anchor, section.title, section.note, body) for section, body in drawn if body),
        block("command", "Run it again", "The command that measured all this, and where it ran.", provenance(evidence)),
        absences(
            ["images were not found beside the evidence"] * (images is None)
            + [section.absent for section, body in drawn if not body]
        ),
    ]
    style, program = own("page.css"), own("page.js")
    page = Template(own("page.html")).substitute(
        title=tag("title", f"{evidence.title}, lowtide"), style=style, script=program, body=join(parts)
    )
    return page.encode()


def own(name: str) -> str:
    return (files("lowtide.report.page") / name).read_text(encoding="utf-8")


def images_note(evidence: Evidence) -> str:
    return f"{counted(len(evidence.seeds), 'seed')}, each started from its own noise. What differs is the model."


def block(anchor: str, title: str, note: str, body: Html) -> Html:
    head = tag("div", tag("h2", title, id=f"{anchor}-title"), tag("p", note, class_="note"), class_="head")
    return tag("section", head, tag("div", body, class_="body"), id=anchor, aria_labelledby=f"{anchor}-title")


def provenance(evidence: Evidence) -> Html:
    copy = tag("button", "Copy", type="button", class_="copy", hidden=True)
    command = tag(
        "div",
        tag("pre", tag("code", evidence.command), tabindex="0", role="region", aria_label="Command"),
        copy,
        class_="command",
    )
    entries = {**evidence.environment, **asked(evidence), "date": evidence.date}
    pairs = join(join([tag("dt", name), tag("dd", str(value))]) for name, value in entries.items() if value not in (None, [], ""))
    return join([command, tag("dl", pairs, class_="environment")])


def asked(evidence: Evidence) -> dict[str, object]:
    request = {name: plain(value) for name, value in evidence.request.items() if value not in (None, [], "")}
    return request | {"seeds": ranges(evidence.seeds)}


def plain(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 3, 8 -> 0-3, 8, as the command line takes them."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join("-".join(map(str, dict.fromkeys(span))) for span in found)


def absences(reasons: Sequence[str]) -> Html | None:
    """One line for all that this page could not show."""
    return tag("p", f"Not on this page: {'; '.join(reasons)}.", class_="absent") if reasons else None
