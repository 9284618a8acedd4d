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
    """Which images: one per seed. Prompts and labels are dealt to images by seed.

    `eta`: how much noise DDIM adds on the way, from 0 (none) to 1 (as much as DDPM); None is the pipeline's own, which is 0.
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
            if getattr(self, name) < 1:
                raise BadInput(
                    f"found {name} {getattr(self, name)}", "at least 1", f"give a larger --{name}"
                )
        check_eta(self.eta)

    def batches(self) -> Iterator["Request"]:
        for start in range(0, len(self.seeds), self.batch):
            yield replace(self, seeds=self.seeds[start : start + self.batch])

    def dealt(self, things: tuple) -> list:
        return [things[seed % len(things)] for seed in self.seeds]


@dataclass(frozen=True)
class Moment:
    """One call of the denoiser: its place in the loop, the timestep of each sample, all arguments by name, and the answer."""

    index: int
    t: Tensor
    arguments: dict[str, Any]
    eps: Tensor


def read_prompts(path: str | Path | None) -> tuple[str, ...]:
    """One prompt a line; without a file, the built-in list."""
    path = Path(path) if path else Path(__file__).with_name("prompts.txt")
    if not path.exists():
        raise BadInput(
            f"found no file {path}", "a text file with one prompt a line", "check the path"
        )
    lines = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not lines:
        raise BadInput(
            f"found no prompt in {path}", "one prompt a line", "write some, or leave --prompts away"
        )
    return lines
