"""One recorded call of the denoiser, the prompts of a file, and the pictures of a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lowtide.errors import BadInput
from lowtide.models import Arguments
from lowtide.settings import Request

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Moment:
    """One call of the denoiser.

    index: which call of the sampling loop it is, from 0.
    t: the timestep of each sample: (batch,).
    arguments: all arguments of the call by name.
    eps: what the denoiser predicts.
    """

    index: int
    t: Tensor
    arguments: Arguments
    eps: Tensor


def joined_moments(parts: Sequence[Moment], images: Sequence[int]) -> Moment:
    """One call of a batch from the calls of its parts, which have so many images each.

    In a call, the guidance branches follow each other, each with all its images. A value without a
    batch axis is the same in all parts.
    """
    if len(parts) == 1:
        return parts[0]
    rows = [len(part.t) for part in parts]

    def joined(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, list | tuple):
            items = zip(*values, strict=True)
            return type(first)(joined(each) for each in items)
        if isinstance(first, dict):
            return {name: joined([value[name] for value in values]) for name in first}
        batched = isinstance(first, Tensor) and first.dim()
        if not batched or [len(value) for value in values] != rows:
            return first
        split = [
            value.unflatten(0, (-1, count)) for value, count in zip(values, images, strict=True)
        ]
        return torch.cat(split, 1).flatten(0, 1)

    return Moment(
        index=parts[0].index,
        t=joined([part.t for part in parts]),
        arguments=joined([part.arguments for part in parts]),
        eps=joined([part.eps for part in parts]),
    )


def read_prompts(path: str | Path | None) -> tuple[str, ...]:
    """The prompts in a text file, one a line; without a file, the built-in list."""
    path = Path(path) if path else Path(__file__).with_name("prompts.txt")
    text = read_text(path, "a UTF-8 text file with one prompt a line")
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise BadInput(
            f"found no prompt in {path}", "one prompt a line", "write some, or leave --prompts away"
        )
    return lines


def pictures_of(request: Request, side: int) -> Tensor:
    """The picture of each seed: (batch, 3, side, side), in [0, 1]."""
    if request.pictures is None:
        raise BadInput(
            "found a pipeline that starts from a picture, and no pictures",
            "a folder of them",
            "give --pictures FOLDER",
        )
    files = _picture_files(Path(request.pictures))
    return torch.stack([_picture(path, side) for path in request.by_seed(files)])


def _picture_files(folder: Path) -> list[Path]:
    """The pictures in the folder, by name."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in entries if path.suffix.lower() in PICTURES]
    if not files:
        raise BadInput(
            f"found no pictures in {folder}",
            f"a folder with files that end in {', '.join(PICTURES)}",
            "check --pictures",
        )
    return files


def _picture(path: Path, side: int) -> Tensor:
    """(3, side, side), in [0, 1]: the middle square of the file."""
    try:
        with Image.open(path) as file:
            fitted = ImageOps.fit(file.convert("RGB"), (side, side))
    except (OSError, ValueError) as error:
        raise BadInput(f"found {path} unreadable ({error})", "a picture", "remove it") from error
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255).permute(2, 0, 1)


def masks_of(request: Request, pictures: Tensor) -> Tensor:
    """One box a picture, drawn from its seed: (batch, 1, side, side), 1 where it is repainted."""
    side = pictures.shape[-1]
    masks = torch.zeros(len(pictures), 1, side, side)
    for mask, seed in zip(masks, request.seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        least = max(1, side // 4)
        height, width = torch.randint(least, 3 * least + 1, (2,), generator=generator).tolist()
        top = int(torch.randint(side - height + 1, (), generator=generator))
        left = int(torch.randint(side - width + 1, (), generator=generator))
        mask[:, top : top + height, left : left + width] = 1
    return masks


def read_text(path: Path, expected: str) -> str:
    """The text of a file that a user named."""
    if not path.exists():
        raise BadInput(f"found no file {path}", expected, "check the path")
    if path.is_dir():
        raise BadInput(f"found a folder at {path}", expected, "name a file")
    try:
        # A byte order mark at the start is no part of the first prompt.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(
            f"found {path} unreadable ({error.strerror})", expected, "check it"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"found bytes in {path} that are not UTF-8", expected, "convert it"
        ) from error
    if "\0" in text:
        raise BadInput(f"found zero bytes in {path}", expected, "convert it to UTF-8")
    return text
