"""One recorded call of the denoiser, and the prompts of a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowtide.errors import BadInput
from lowtide.models import Arguments


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
    lines = tuple(line.strip() for line in _read_text(path).splitlines() if line.strip())
    if not lines:
        raise BadInput(
            f"found no prompt in {path}", "one prompt a line", "write some, or leave --prompts away"
        )
    return lines


def _read_text(path: Path) -> str:
    expected = "a UTF-8 text file with one prompt a line"
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
