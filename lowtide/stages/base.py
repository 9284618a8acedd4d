"""Stage, Recipe, Job: a stage is a frozen dataclass with run(job), a recipe a tuple of stages."""

import hashlib
import json
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from lowtide.costs import Cost, Workload
from lowtide.distributed.world import World
from lowtide.errors import BadInput
from lowtide.machine.room import Room
from lowtide.models import Adapter, Arguments
from lowtide.models.named_inputs import mapped_inputs
from lowtide.models.trace import mapped
from lowtide.nn.placement import Placement
from lowtide.nn.plan import Plan
from lowtide.report.progress import track
from lowtide.sampling.call_values import recorded
from lowtide.sampling.drivers import Role, role_of
from lowtide.sampling.pipelines import Pipeline
from lowtide.settings import Settings, StageOptions
from lowtide.stages.call import Call
from lowtide.stages.conditions import Conditions, kept_to
from lowtide.stages.finished_work import FinishedWork
from lowtide.validation import as_tuple, check

Item = TypeVar("Item")
Tree = TypeVar("Tree")  # tensors, nested in tuples, lists and dicts


@dataclass(frozen=True)
class Stage(ABC):
    """One step of a recipe; a frozen dataclass whose fields are its options.

    essential: no recipe works without it.
    whole: it works on the whole network at once, which has to fit on the device.
    """

    essential: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset()  # names of the settings that the stage reads

    @abstractmethod
    def run(self, job: "Job") -> None:
        """Do the work."""

    def summary(self, job: "Job") -> str:
        """What `run` did, in a few words for the terminal; by default the class's first line."""
        first = (type(self).__doc__ or "").partition("\n")[0].removesuffix(".")
        return first[:1].lower() + first[1:]

    def check(self, settings: Settings) -> None:  # noqa: B027 - most stages have nothing to check
        """Raise, before anything runs, where these settings leave the stage without its input."""

    def check_model(  # noqa: B027 - most stages work on every model
        self, adapter: Adapter, settings: Settings
    ) -> None:
        """Raise, before anything runs, where this model leaves a setting without effect."""

    def cost(self, load: Workload) -> Cost | None:
        """Seconds and bytes of `run`. Where none is known, `lowtide plan` says so."""
        return None

    def predict_plan(self, job: "Job") -> None:  # noqa: B027 - most stages leave the plan alone
        """Change the plan as `run` does, for a model of shapes alone.

        What depends on the calibration data takes its most likely value.
        """


Recipe = tuple[Stage, ...]


@dataclass(frozen=True)
class Term:
    """A loss on features of the quantized and of the float model, for `steps` consecutive steps.

    Each feature is (steps, samples, channels, positions); the loss is a scalar.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int = 2


@dataclass
class Job:
    """A model on its way from float to packed, and the folder for finished parts of the work.

    calls: the calibration set.
    placement: which parts of the model are on the device.
    room: how many samples fit there at once.
    terms: losses that stages add to a later distillation.
    given_role: what the pipeline gives the denoiser, where `pipe` is not that pipeline.
    maintained: the temporal block is already rounded or cached for its own features, so no later
        stage rounds it with the blocks.
    world: the processes that work on it together.
    turns: how often stages that can run again have begun, which tells their records apart.
    """

    pipe: Pipeline
    model: nn.Module
    adapter: Adapter
    settings: Settings
    method: str
    folder: Path | None = None
    plan: Plan = field(default_factory=Plan)
    calls: list[Call] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)
    maintained: bool = False
    world: World = field(default_factory=World)
    given_role: Role | None = None
    turns: Counter[str] = field(default_factory=Counter)
    console: Console = field(default_factory=lambda: Console(file=sys.stderr))
    placement: Placement = field(init=False)
    room: Room = field(init=False)

    def __post_init__(self) -> None:
        self.console.quiet |= not self.world.first
        self.placement = Placement(self.model, self.device)
        self.room = Room(self.device, self.say)

    def say(self, line: str) -> None:
        """Print a line on the terminal."""
        self.console.print(line, soft_wrap=True, markup=False)

    def changed(self, **changes: object) -> "Job":
        """This job with other values of some fields, in the same place."""
        other = replace(self, **cast(Any, changes))
        other.placement = self.placement
        other.room = self.room
        return other

    @property
    def batch(self) -> int:
        """Samples of one learning iteration, over all ranks."""
        return self.settings.batch * self.world.size

    @cached_property
    def conditions(self) -> Conditions:
        """What the run began with: the first rank decides for all."""
        return self.world.of_first(lambda: kept_to(self.folder, self.device))

    @property
    def role(self) -> Role:
        """What the pipeline gives the denoiser and takes from it."""
        return self.given_role or role_of(self.pipe)

    def generator(self, *names: str) -> torch.Generator:
        """A generator seeded by (seed, stage, unit), independent of what ran before."""
        digest = hashlib.sha256("/".join((str(self.settings.seed), *names)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    @cached_property
    def finished(self) -> FinishedWork | None:
        """The finished parts of the run, where a folder keeps them."""
        return self.folder and FinishedWork(self.folder, self.conditions, self.say)

    def recorded(self, stage: str, unit: str) -> dict[str, Tensor] | None:
        """The result for this unit that an earlier, interrupted run of the same recipe recorded."""
        finished = self.finished
        if finished is None:
            return None
        return self.world.of_first(lambda: finished.recorded(f"{stage}-{unit}"))

    def agreed(self, stage: str, unit: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Record the result for a finished unit; every rank goes on with that of the first."""
        self.record(stage, unit, tensors)
        if self.world.size == 1:
            return tensors
        return self.world.of_first(lambda: {name: each.cpu() for name, each in tensors.items()})

    def record(self, stage: str, unit: str, tensors: dict[str, Tensor]) -> None:
        """Keep the result on the first rank: write a new file, then rename it."""
        if self.finished and self.world.first:
            self.finished.record(f"{stage}-{unit}", tensors)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def visit(self, target: object) -> AbstractContextManager[None]:
        """A context in which the module of this name is on the device; other targets need none."""
        if isinstance(target, str):
            return self.placement.visit(self.model.get_submodule(target))
        return nullcontext()

    def on_device(self, tree: Tree) -> Tree:
        """Nested arguments with all tensors on the model's device."""
        device = self.device
        return mapped(tree, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)

    def track(self, items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
        """Iterate over the items with a progress bar that shows the time left."""
        return track(items, total=total, title=title, console=self.console)


def part_of(arguments: Arguments, span: slice, adapter: Adapter) -> Arguments:
    """Some samples of a call; a value without a batch axis is the same for all."""
    samples = len(arguments["timestep"])

    def cut(name: str, leaf: Tensor) -> Tensor:
        rows = adapter.architecture.rows(name, leaf, samples)
        return leaf[rows * span.start : rows * span.stop] if rows else leaf

    return mapped_inputs(arguments, cut)


def run_recipe(recipe: Recipe, job: Job) -> None:
    """Run every stage in turn; time it and print what it did."""
    seconds = job.report.setdefault("seconds", {})
    summaries = job.report.setdefault("summaries", {})
    for stage in recipe:
        started = time.perf_counter()
        _run_in_place(stage, job)
        name = type(stage).__name__
        seconds[name] = round(seconds.get(name, 0) + time.perf_counter() - started, 2)
        summaries[name] = stage.summary(job)
        line = f"{name}: {summaries[name]}, {seconds[name]:.1f} s"
        job.say(line)


def _run_in_place(stage: Stage, job: Job) -> None:
    """Run the stage, with the whole network on the device if the stage works on all of it."""
    if stage.whole and job.placement.blocks:
        name = type(stage).__name__
        line = f"{name}: works on the whole network at once, so all of it is on {job.device}"
        job.say(line)
        with job.placement.visit(job.model):
            stage.run(job)
    else:
        stage.run(job)


def ablated(recipe: Recipe, without: Sequence[str]) -> Recipe:
    """The recipe without the stages of these names, in any case of letters."""
    if isinstance(without, str):
        raise BadInput(f"found without={without!r}", "a list of stages", f"give [{without!r}]")
    optional = {type(stage).__name__: not stage.essential for stage in recipe}
    by_lower = {name.lower(): name for name in optional}
    for name in without:
        if name.lower() not in by_lower:
            raise BadInput(
                f"found no stage {name!r}", f"one of {', '.join(optional)}", "check --without"
            )
        if not optional[by_lower[name.lower()]]:
            others = " or ".join(other for other in optional if optional[other])
            way_out = f"leave out {others}" if others else "use no --without with this method"
            raise BadInput(
                f"found --without {by_lower[name.lower()]}",
                "a stage that the others can do without",
                way_out,
            )
    left_out = {by_lower[name.lower()] for name in without}
    return tuple(stage for stage in recipe if type(stage).__name__ not in left_out)


def checked(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe, after every stage has checked the settings."""
    for stage in recipe:
        stage.check(settings)
    return recipe


def tuned(recipe: Recipe, options: StageOptions) -> Recipe:
    """The recipe with these options: values of fields by the name of a stage, in any case.

    Every stage of that name gets them.
    """
    by_lower = {type(stage).__name__.lower(): stage for stage in recipe if fields(stage)}
    for name in options:
        if name.lower() not in by_lower:
            stages = [
                f"{type(stage).__name__}: {_option_names(stage)}" for stage in by_lower.values()
            ]
            raise BadInput(
                f"found no stage {name!r} that takes options",
                f"one of {'; '.join(stages)}",
                "check --set and [stages]",
            )
    values = {name.lower(): each for name, each in options.items()}
    return tuple(
        _with_options(stage, values.get(type(stage).__name__.lower(), {})) for stage in recipe
    )


def _with_options(stage: Stage, options: Mapping[str, object]) -> Stage:
    """The stage with these values of its fields, checked for name, kind and bounds."""
    title = type(stage).__name__
    names = {each.name for each in fields(stage)}
    if unknown := [name for name in options if name not in names]:
        raise BadInput(
            f"found no option {unknown[0]!r} of {title}",
            f"one of {_option_names(stage)}",
            "check the spelling",
        )
    values = {name: as_tuple(value) for name, value in options.items()}
    check(type(stage), values, f"{title} ")
    return replace(stage, **values)


def _option_names(stage: Stage) -> str:
    return ", ".join(each.name for each in fields(stage))


def recipe_digest(recipe: Recipe, settings: Settings, fingerprint: str, ranks: int = 1) -> str:
    """A hash of what a resumed run must share: stages, settings, the model's weights, the code.

    Of the batch, the samples of all ranks count: 2 ranks with 8 go on where 1 with 16 stopped.
    """
    stages = [(type(stage).__name__, asdict(stage)) for stage in recipe]
    values = asdict(settings) | {"batch": settings.batch * ranks}
    text = json.dumps([stages, values, fingerprint, code_hash()], sort_keys=True, default=recorded)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def code_hash() -> str:
    """A hash of lowtide's code: results of two versions for the same recipe must not mix."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
