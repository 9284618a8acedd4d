"""The images of the comparison as data URIs, as many and as large as the page has room for."""

import io
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image

from lowtide.errors import BadInput
from lowtide.report.evidence import AGAIN, Evidence

MOST_BYTES = 5_000_000
_SIDES = (512, 384, 256, 192, 128, 96)
_TINY = 128
Paths = Mapping[tuple[str, int], Path]


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


def sheets(evidence: Evidence, folder: Path) -> Iterator[Sheet]:
    """Images that may fit: the files themselves, then smaller images, then fewer seeds."""
    images = folder / "images"
    if not images.is_dir():
        return
    seeds = evidence.request.seeds
    keys = product(evidence.models, seeds)
    paths = {(key, seed): images / key / f"{seed}.png" for key, seed in keys}
    width, height = _common_size(paths)
    if sum(path.stat().st_size for path in paths.values()) < MOST_BYTES:
        uris = {key: _uri(path.read_bytes(), "png") for key, path in paths.items()}
        yield Sheet(seeds, uris, width, height, reduced=False)
    choices = [(seeds, side) for side in _SIDES]
    halvings = range(1, len(seeds).bit_length())
    choices += [(seeds[: len(seeds) >> halving], _SIDES[-1]) for halving in halvings]
    yield from filter(None, (_reduced(paths, *choice) for choice in choices))


def _common_size(paths: Paths) -> tuple[int, int]:
    sizes = dict.fromkeys(map(_size, paths.values()))
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
    except OSError as error:
        raise BadInput(f"found {path} that cannot be read", "a PNG image", AGAIN) from error


def _reduced(paths: Paths, seeds: tuple[int, ...], side: int) -> Sheet | None:
    """The images at a smaller size, or None as soon as they are too large for a page."""
    uris = {}
    size = (0, 0)
    room = MOST_BYTES
    for key in (key for key in paths if key[1] in seeds):
        uris[key], size = _webp(paths[key], side)
        room -= len(uris[key])
        if room < 0:
            return None
    return Sheet(seeds, uris, *size, reduced=True)


def _webp(path: Path, side: int) -> tuple[str, tuple[int, int]]:
    """Tiny images keep every pixel: compression errors could pass for quantization errors."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    lossless = max(small.size) <= _TINY
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, format="WEBP", quality=88, lossless=lossless)
    return _uri(stream.getvalue(), "webp"), small.size


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{b64encode(data).decode()}"
