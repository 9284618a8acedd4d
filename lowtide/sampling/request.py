"""Which images to draw, and one recorded call of the denoiser."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lowtide.errors import BadInput
from lowtide.validation import check_eta


@dataclass(frozen=True)
class Request:
    """Which images to draw: one per seed. The seed also picks the image's prompt and label.

    `eta`: how much noise DDIM adds in each step, from 0 (none) to 1 (as much as DDPM). None is the
    pipeline's own default, which is 0.
    """

    steps: int = 50
    seeds: tuple[int, ...] = (0,)
    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    guidance: float | None = None
    batch: int = 16
    size: int | None = None
    eta: float | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise BadInput("found no seeds", "at least one", "give --seeds, such as --seeds 0-63")
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if value < 1:
                raise BadInput(f"found {name} {value}", "at least 1", f"give a larger --{name}")
        check_eta(self.eta)

    def batches(self) -> Iterator["Request"]:
        for start in range(0, len(self.seeds), self.batch):
            yield replace(self, seeds=self.seeds[start : start + self.batch])

    def dealt(self, values: tuple) -> list:
        """One of the values for each image, chosen by its seed."""
        return [values[seed % len(values)] for seed in self.seeds]


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
    arguments: dict[str, Any]
    eps: Tensor


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
