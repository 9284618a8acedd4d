"""The images: two of the same seed under a slider, and the contact sheet of all seeds and models."""

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lowtide.errors import BadInput
from lowtide.report.page.evidence import AGAIN, Evidence, Model
from lowtide.report.page.markup import Html, counted, figures, join, tag, unseen

SIDES = (512, 384, 256, 192, 128, 96)
QUALITY = 88
TINY = 128
CELL = 54
SHEET, GAP = 1044, 5


@dataclass(frozen=True)
class Sheet:
    """The images as data URIs, by model and seed; `side` is their size, and `reduced` says that it is not the original one."""

    seeds: tuple[int, ...]
    uris: dict[tuple[str, int], str]
    width: int
    height: int
    reduced: bool


def sheet(evidence: Evidence, budget: int) -> Sheet | None:
    """As many images, as large, as the budget of bytes allows; None if the folder has no images at all."""
    if not (evidence.folder / "images").is_dir():
        return None
    width, height = one_size(evidence)
    paths = {(model.key, seed): evidence.image(model, seed) for model in evidence.models for seed in evidence.seeds}
    if sum(path.stat().st_size for path in paths.values()) * 4 / 3 <= budget:
        return Sheet(evidence.seeds, {one: uri(path.read_bytes(), "png") for one, path in paths.items()}, width, height, False)
    tried = (reduced(paths, seeds, side, budget) for seeds, side in smaller(evidence.seeds, max(width, height)))
    return next((found for found in tried if found), None) or reduced(paths, evidence.seeds[:1], SIDES[-1], math.inf)


def one_size(evidence: Evidence) -> tuple[int, int]:
    found: dict[tuple[int, int], Path] = {}
    for model in evidence.models:
        for seed in evidence.seeds:
            path = evidence.image(model, seed)
            found.setdefault(measured(path), path)
    if len(found) != 1:
        sizes = " and ".join(f"{width}x{height}" for width, height in found) or "none"
        raise BadInput(f"found images of sizes {sizes}", "one size", AGAIN)
    return next(iter(found))


def measured(path: Path) -> tuple[int, int]:
    if not path.is_file():
        raise BadInput(f"found no image {path}", "one for each model and seed", AGAIN)
    try:
        with Image.open(path) as image:
            return image.size
    except (UnidentifiedImageError, OSError) as wrong:
        raise BadInput(f"found {path} that cannot be read", "a PNG image", AGAIN) from wrong


def smaller(seeds: tuple[int, ...], side: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Smaller images first, then fewer."""
    fitting = [each for each in SIDES if each <= side] or [side]
    yield from ((seeds, each) for each in fitting)
    count = len(seeds)
    while count > 1:
        count //= 2
        yield seeds[:count], fitting[-1]


def reduced(paths: dict[tuple[str, int], Path], seeds: tuple[int, ...], side: int, budget: float) -> Sheet | None:
    """The images at a smaller size, or None as soon as they outgrow the budget."""
    kept, total, size = {}, 0, (0, 0)
    for one, path in paths.items():
        if one[1] in seeds:
            kept[one], size = webp(path, side)
            total += len(kept[one])
            if total > budget:
                return None
    return Sheet(seeds, kept, *size, True)


def webp(path: Path, side: int) -> tuple[str, tuple[int, int]]:
    """Tiny images keep every pixel: what compression does to them could pass for what quantization did."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    lossless = max(small.size) <= TINY
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, format="WEBP", quality=QUALITY, lossless=lossless)
    return uri(stream.getvalue(), "webp"), small.size


def uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def caption(evidence: Evidence, seed: int) -> str:
    found = evidence.captions[evidence.seeds.index(seed)] if evidence.captions else ""
    return found or f"seed {seed}"


def section(evidence: Evidence, images: Sheet) -> Html:
    return join([slider(evidence, images), contact(evidence, images), remark(evidence, images)])


def slider(evidence: Evidence, images: Sheet) -> Html:
    """The stage; the script fills it from the contact sheet, and it stays hidden without one."""
    left, right = (tag("img", alt="", class_=side, draggable="false") for side in ("before", "after"))
    handle = tag("span", tag("span", class_="grip"), class_="handle", aria_hidden="true")
    slide = tag("input", type="range", min=0, max=100, value=50, step=1, aria_label="Where the two images meet")
    names = (tag("span", class_=f"side {side}", aria_hidden="true") for side in ("left", "right"))
    stage = tag("div", left, right, slide, handle, *names, class_="stage", style=f"aspect-ratio:{images.width}/{images.height}")
    return tag("div", stage, controls(evidence), class_="compare", hidden=True, data_tiny=tiny(images))


def tiny(images: Sheet) -> bool:
    return max(images.width, images.height) <= TINY


def controls(evidence: Evidence) -> Html:
    second = evidence.models.index(evidence.lead) if evidence.lead else 0
    seed = tag(
        "div",
        tag("button", "Previous", type="button", data_move="-1"),
        tag("button", "Next", type="button", data_move="1"),
        tag("span", class_="which"),
        class_="seed",
    )
    return tag(
        "div",
        tag("p", class_="told", aria_live="polite"),
        choice("Left", "left", evidence, evidence.models.index(evidence.reference)),
        choice("Right", "right", evidence, second),
        seed,
        tag("label", tag("input", type="checkbox", class_="difference"), " Difference of the two, ×4", class_="check"),
        tag("p", "Drag the line, or focus it and use the arrow keys. A click on an image below brings it here.", class_="note"),
        class_="controls",
    )


def choice(label: str, side: str, evidence: Evidence, chosen: int) -> Html:
    options = [tag("option", model.name, value=place, selected=place == chosen) for place, model in enumerate(evidence.models)]
    return tag("label", tag("span", label), tag("select", join(options), class_=f"choose {side}"), class_="choice")


def contact(evidence: Evidence, images: Sheet) -> Html:
    """A row for each model, a column for each seed."""
    heads = [tag("th", tag("span", caption(evidence, seed), title=caption(evidence, seed)), scope="col") for seed in images.seeds]
    rows = [row(evidence, images, model) for model in evidence.models]
    table = tag(
        "table",
        tag("caption", unseen("Images by model and seed")),
        tag("thead", tag("tr", tag("td"), join(heads))),
        tag("tbody", join(rows)),
        data_tiny=tiny(images),
        style=f"--cell:{cell_width(images)}px;--shape:{images.width}/{images.height}",
    )
    return tag("div", table, class_="contact scrolls", tabindex="0", role="region", aria_label="All seeds and models")


def cell_width(images: Sheet) -> int:
    """All seeds in one row of a wide page where that leaves them large enough; otherwise the row scrolls."""
    fitting = SHEET // len(images.seeds) - GAP
    return min(max(fitting, CELL), 3 * CELL if tiny(images) else 5 * CELL)


def row(evidence: Evidence, images: Sheet, model: Model) -> Html:
    cells = [cell(evidence, images, model, seed) for seed in images.seeds]
    return tag("tr", tag("th", model.name, scope="row"), join(cells))


def cell(evidence: Evidence, images: Sheet, model: Model, seed: int) -> Html:
    what = caption(evidence, seed)
    told = {
        name: shown(values[place]) for name, values in scores(evidence, model).items() for place in [evidence.seeds.index(seed)]
    }
    image = tag("img", src=images.uris[model.key, seed], alt=f"{what}, {model.name}", decoding="async")
    psnr = told.get("psnr")
    return tag(
        "td",
        tag(
            "button",
            image,
            type="button",
            tabindex="-1",
            data_seed=images.seeds.index(seed),
            aria_label=f"Compare {what}, {model.name}",
        ),
        tag("span", psnr, class_="score", title=f"PSNR {psnr} dB") if psnr else None,
        data_scores=", ".join(f"{name.upper()} {value}" for name, value in told.items()) or None,
    )


def scores(evidence: Evidence, model: Model) -> dict[str, list[float | None]]:
    """Per-image values that line up with the seeds; the reference has none to itself."""
    if model is evidence.reference:
        return {}
    wrong = next((name for name, values in model.per_image.items() if len(values) != len(evidence.seeds)), None)
    if wrong:
        raise BadInput(
            f"found {len(model.per_image[wrong])} values of {wrong}", f"one for each of the {len(evidence.seeds)} seeds", AGAIN
        )
    return dict(model.per_image)


def shown(value: float | None) -> str:
    return figures(math.nan if value is None else value)


def remark(evidence: Evidence, images: Sheet) -> Html | None:
    if not images.reduced:
        return None
    count = f"{len(images.seeds)} of {counted(len(evidence.seeds), 'seed')}, " if len(images.seeds) < len(evidence.seeds) else ""
    told = f"To keep this page small: {count}images as WebP of {images.width}×{images.height} pixels."
    return tag("p", told, " All of them, as they were, lie in images/.", class_="note")
