"""Stage, Recipe, Job: a stage is a frozen dataclass with run(job), a recipe a tuple of stages, a job what they work on."""

import hashlib
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowtide.costs import Cost, Workload
from lowtide.errors import BadInput
from lowtide.models import Adapter
from lowtide.models.trace import mapped
from lowtide.nn.plan import Plan
from lowtide.settings import Settings
from lowtide.validation import as_tuple, check


class Stage(ABC):
    """One step of a recipe; a frozen dataclass whose fields are its options.

    `essential`: no recipe is whole without it.
    """

    essential: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset()  # names of the settings that the stage reads

    @abstractmethod
    def run(self, job: "Job") -> None:
        """Do the work."""

    def check(self, settings: Settings) -> None:  # noqa: B027 - most stages have nothing to check
        """Raise, before anything runs, where the stage could not do its work."""

    def cost(self, load: Workload) -> Cost | None:
        """Seconds and bytes of `run`. None where no price is known, and `lowtide plan` says so."""
        return None

    def foresee(self, job: "Job") -> None:  # noqa: B027 - most stages leave the plan alone
        """Change the plan as `run` will, on a model of shapes; what only data decides is guessed."""


Recipe = tuple[Stage, ...]
# Quantized and float features of the same pairs of consecutive steps, (2, pairs, channels, positions), to a distance.
Term = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Job:
    """A model on its way from float to packed, and where finished pieces of the work are kept.

    `terms`: what a later distillation adds to its loss, announced by stages before it. `maintained`: the temporal block has
    been rounded or cached for its own features, so that nobody rounds it for the sake of pictures.
    """

    pipe: Any
    model: nn.Module
    adapter: Adapter
    settings: Settings
    method: str
    folder: Path | None = None
    plan: Plan = field(default_factory=Plan)
    calls: list["Call"] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)
    maintained: bool = False
    console: Console = field(default_factory=lambda: Console(file=sys.stderr))

    def generator(self, *names: str) -> torch.Generator:
        """Random numbers that depend on (seed, stage, unit), never on what ran before."""
        digest = hashlib.sha256("/".join((str(self.settings.seed), *names)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def recorded(self, stage: str, unit: str) -> dict[str, Tensor] | None:
        """What an earlier, interrupted run of the same recipe found for this unit."""
        path = self.record_path(stage, unit)
        return load_file(path) if path and path.exists() else None

    def record(self, stage: str, unit: str, found: dict[str, Tensor]) -> None:
        """Keep a finished unit: written beside, then renamed."""
        if path := self.record_path(stage, unit):
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".new")
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, fresh)
            fresh.replace(path)

    def record_path(self, stage: str, unit: str) -> Path | None:
        return self.folder and self.folder / "units" / f"{stage}-{unit}.safetensors"

    def on_device(self, tree: Any) -> Any:
        """Arguments as the model wants them: on its device."""
        device = next(self.model.parameters()).device
        return mapped(tree, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)

    def track(self, things: Iterable[Any], title: str, total: int | None = None) -> Iterator[Any]:
        """The things, behind a bar with the time left."""
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            yield from progress.track(things, total=total, description=title)


@dataclass(frozen=True)
class Call:
    """One recorded call of the denoiser: its arguments by name, with a batch of samples at one timestep."""

    timestep: int
    arguments: dict[str, Any]
    kept: bool


def run_recipe(recipe: Recipe, job: Job) -> None:
    """The engine: every stage in turn, each timed."""
    seconds = job.report.setdefault("seconds", {})
    for stage in recipe:
        started = time.perf_counter()
        stage.run(job)
        name = type(stage).__name__
        seconds[name] = round(seconds.get(name, 0) + time.perf_counter() - started, 2)
        job.console.print(f"{name:<16} {seconds[name]:8.1f} s")


def ablated(recipe: Recipe, without: Sequence[str]) -> Recipe:
    """The recipe without the stages of these names, whatever their case."""
    spare = {type(stage).__name__: not stage.essential for stage in recipe}
    known = {name.lower(): name for name in spare}
    for name in without:
        if name.lower() not in known:
            raise BadInput(
                f"found no stage {name!r}", f"one of {', '.join(spare)}", "check --without"
            )
        if not spare[known[name.lower()]]:
            others = " or ".join(other for other in spare if spare[other])
            way_out = (
                f"leave out {others}"
                if others
                else "change --without: this method has no stage to spare"
            )
            raise BadInput(
                f"found --without {known[name.lower()]}",
                "a stage that the others can do without",
                way_out,
            )
    left = {known[name.lower()] for name in without}
    return tuple(stage for stage in recipe if type(stage).__name__ not in left)


def checked(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe, once every stage has looked at the settings."""
    for stage in recipe:
        stage.check(settings)
    return recipe


def tuned(recipe: Recipe, asked: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe with these options: fields by the name of a stage, whatever its case; every stage of that name takes them."""
    known = {type(stage).__name__.lower(): stage for stage in recipe if fields(stage)}
    for name in asked:
        if name.lower() not in known:
            there = "; ".join(
                f"{type(stage).__name__}: {option_names(stage)}" for stage in known.values()
            )
            raise BadInput(
                f"found no stage {name!r} that takes options",
                f"one of {there}",
                "check --set and [stages]",
            )
    given = {name.lower(): options for name, options in asked.items()}
    return tuple(
        with_options(stage, given.get(type(stage).__name__.lower(), {})) for stage in recipe
    )


def with_options(stage: Stage, options: Mapping[str, Any]) -> Stage:
    """The stage with these fields, checked for name, kind and bounds."""
    title, known = type(stage).__name__, {each.name for each in fields(stage)}
    if unknown := [name for name in options if name not in known]:
        raise BadInput(
            f"found no option {unknown[0]!r} of {title}",
            f"one of {option_names(stage)}",
            "check the spelling",
        )
    given = {name: as_tuple(value) for name, value in options.items()}
    check(type(stage), given, f"{title} ")
    return replace(stage, **given)


def option_names(stage: Stage) -> str:
    return ", ".join(each.name for each in fields(stage))


def recipe_digest(recipe: Recipe, settings: Settings, fingerprint: str) -> str:
    """What a resumable run must agree on: stages and their numbers, settings, the model's weights, and what worked on them."""
    stages = [(type(stage).__name__, asdict(stage)) for stage in recipe]
    text = json.dumps(
        [stages, asdict(settings), fingerprint, source()], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def source() -> str:
    """A hash of lowtide itself: another version may learn something else by the same recipe, and the two do not mix."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
