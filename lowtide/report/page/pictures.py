"""The images of the comparison as data URIs, as many and as large as the page has room for."""

import io
import math
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lowtide.errors import BadInput
from lowtide.report.evidence import AGAIN, Evidence, Model
from lowtide.report.wording import figures

_SIDES = (512, 384, 256, 192, 128, 96)
_QUALITY = 88
_TINY = 128


@dataclass(frozen=True)
class Sheet:
    """Images by model and seed; `reduced` says that they are not the original files."""

    seeds: tuple[int, ...]
    uris: dict[tuple[str, int], str]
    width: int
    height: int
    reduced: bool

    @property
    def tiny(self) -> bool:
        """Small enough for single pixels to matter."""
        return max(self.width, self.height) <= _TINY


def sheet(evidence: Evidence, budget: int) -> Sheet | None:
    """The images within a budget of bytes; None if the folder has no images at all."""
    if not (evidence.folder / "images").is_dir():
        return None
    width, height = _common_size(evidence)
    models = {model.key: model for model in evidence.models}
    keys = [(key, seed) for key in models for seed in evidence.seeds]
    paths = {key: evidence.image(models[key[0]], key[1]) for key in keys}
    if sum(path.stat().st_size for path in paths.values()) * 4 / 3 <= budget:
        uris = {key: _uri(path.read_bytes(), "png") for key, path in paths.items()}
        return Sheet(evidence.seeds, uris, width, height, reduced=False)
    *choices, last = _smaller(evidence.seeds, max(width, height))
    sheets = (_reduced(paths, seeds, side, budget) for seeds, side in choices)
    return next(filter(None, sheets), None) or _reduced(paths, *last, math.inf)


def _common_size(evidence: Evidence) -> tuple[int, int]:
    keys = [(model, seed) for seed in evidence.seeds for model in evidence.models]
    sizes = dict.fromkeys(_size(evidence.image(model, seed)) for model, seed in keys)
    if len(sizes) != 1:
        listed = " and ".join(f"{width}x{height}" for width, height in sizes)
        raise BadInput(f"found images of sizes {listed}", "one size", AGAIN)
    return next(iter(sizes))


def _size(path: Path) -> tuple[int, int]:
    if not path.is_file():
        raise BadInput(f"found no image {path}", "one for each model and seed", AGAIN)
    try:
        with Image.open(path) as image:
            return image.size
    except (UnidentifiedImageError, OSError) as wrong:
        raise BadInput(f"found {path} that cannot be read", "a PNG image", AGAIN) from wrong


def _smaller(seeds: tuple[int, ...], side: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Smaller images first, then fewer."""
    sides = [each for each in _SIDES if each <= side] or [side]
    yield from ((seeds, each) for each in sides)
    while len(seeds) > 1:
        seeds = seeds[: len(seeds) // 2]
        yield seeds, sides[-1]


def _reduced(
    paths: dict[tuple[str, int], Path], seeds: tuple[int, ...], side: int, budget: float
) -> Sheet | None:
    """The images at a smaller size, or None as soon as they exceed the budget."""
    uris = {}
    size = (0, 0)
    for key in (key for key in paths if key[1] in seeds):
        uris[key], size = _webp(paths[key], side)
        budget -= len(uris[key])
        if budget < 0:
            return None
    return Sheet(seeds, uris, *size, reduced=True)


def _webp(path: Path, side: int) -> tuple[str, tuple[int, int]]:
    """Tiny images keep every pixel: compression errors could pass for quantization errors."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    lossless = max(small.size) <= _TINY
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, format="WEBP", quality=_QUALITY, lossless=lossless)
    return _uri(stream.getvalue(), "webp"), small.size


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def scores(evidence: Evidence, model: Model, seed: int) -> dict[str, str]:
    """The metrics of one image in words; the reference has none to itself."""
    count = len(evidence.seeds)
    wrong = [name for name in model.per_image if len(model.per_image[name]) != count]
    if wrong:
        message = f"found {len(model.per_image[wrong[0]])} values of {wrong[0]}"
        raise BadInput(message, f"one for each of the {count} seeds", AGAIN)
    if model is evidence.reference:
        return {}
    values = {name: values[evidence.seeds.index(seed)] for name, values in model.per_image.items()}
    known = {name: math.nan if value is None else value for name, value in values.items()}
    return {name: f"{name.upper()} {figures(value)}" for name, value in known.items()}
