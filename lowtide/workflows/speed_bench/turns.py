"""A packed model's speed: beside its float model, layer by layer, and beside other libraries.

Each variant has a process of its own. They take steps in turns, so that a busy machine slows all of
them alike, and every number is a median. Steps visit some calibrated timesteps in turn. At a first
visit a fused model computes the features of the conditions; at a later one it has them, as for the
second image of a session. Who draws one image visits every timestep once, so the first visits are
what is compared.
"""

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lowtide.checkpoint import provenance
from lowtide.errors import BadInput
from lowtide.report.kinds_of_work import BETWEEN, PRODUCTS, TORCH
from lowtide.report.progress import track
from lowtide.workflows.speed_bench import peers
from lowtide.workflows.speed_bench.channel import Answer, Ended, Variant, closing

PACKED = "packed"
PLAIN = "plain"
FLOAT = "float"
MODULE = "lowtide.workflows.speed_bench.variant"
TITLES = {
    PACKED: "lowtide, fused",
    PLAIN: "lowtide, layer by layer",
    FLOAT: "torch fp32, eager",
    "torch-bf16": "torch bf16, eager",
    "compile": "torch fp32, compiled",
}
PARTS_SECONDS = 3.0  # of steps that are timed part by part, but at least and at most so many steps
PARTS_REPEATS = (2, 15)
VISITS_DIFFER = 0.02
MOST_TIMESTEPS = 4
COLD_MATTERS = 5.0  # seconds of a first step; in a longer one the caches do not matter


@dataclass(frozen=True)
class SpeedOptions:
    """What is measured: images at once, threads, steps of each variant, and the peers' names.

    floating: the float model; without it, the one that the packed model was made of. kept: a folder
    where other libraries' converted models stay for the next run.
    """

    batch: int = 1
    threads: int = 1
    repeats: int = 24
    against: tuple[str, ...] = ()
    floating: str | None = None
    kept: Path | None = None

    @property
    def timesteps(self) -> int:
        """The most timesteps that are visited: each once as the first time, and once again."""
        return min(MOST_TIMESTEPS, self.repeats // 2)

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "repeats"):
            least = 2 if name == "repeats" else 1
            if getattr(self, name) < least:
                found = f"found {name} {getattr(self, name)}"
                raise BadInput(found, f"at least {least}", f"give a greater --{name}")
        peers.check_names(self.against)


@dataclass(frozen=True)
class Bench:
    """Where a measurement works, and what it told the user along the way."""

    model: str
    options: SpeedOptions
    folder: Path
    kept: Path
    notes: list[str]

    @property
    def calls(self) -> Path:
        return self.folder / "calls.npz"

    def own(self, variant: str, model: str) -> Variant:
        """A process of one of lowtide's own variants."""
        order = {
            "variant": variant,
            "model": model,
            "calls": str(self.calls),
            "threads": self.options.threads,
            "batch": self.options.batch,
            "most": self.options.timesteps,
        }
        return self.start(variant, [sys.executable, "-m", MODULE, json.dumps(order)])

    def start(self, name: str, command: Sequence[str]) -> Variant:
        return Variant(command, self.options.threads, self.folder / f"{name}.log")


def measure_speed(model: str, options: SpeedOptions) -> Answer:
    """Measure a packed model; plain JSON values, which report/speed_tables.py makes readable."""
    with _bench(model, options) as bench:
        variants: dict[str, Variant] = {}
        with closing(variants):
            _start_all(bench, variants)
            firsts = _first_steps(bench, variants)
            turns = _take_turns(variants, options, firsts)
            memory = {name: variant.ask("memory")["peak"] for name, variant in variants.items()}
            loads = {name: variant.loaded for name, variant in variants.items()}
            parts = {
                name: variants[name].ask("parts", repeats=_parts_repeats(firsts[name]))
                for name in (PACKED, FLOAT)
                if name in variants
            }
    rows = [_row(name, loads[name], firsts[name], memory[name], turns) for name in firsts]
    return _result(bench, rows, parts, turns.steps)


@contextmanager
def _bench(model: str, options: SpeedOptions) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="lowtide-speed-") as name:
        folder = Path(name)
        yield Bench(model, options, folder, options.kept or folder, [])


def _start_all(bench: Bench, variants: dict[str, Variant]) -> None:
    """Load the variants one after another. The packed model is the first: it makes the calls."""
    variants[PACKED] = bench.own(PACKED, bench.model)
    floating = _start_float(bench, variants)
    variants[PLAIN] = bench.own(PLAIN, bench.model)
    for name in bench.options.against:
        if floating is None:
            bench.notes.append(f"{name} was left out: it needs the float model")
        elif name in peers.TORCH:
            _try(bench, variants, peers.TORCH[name], floating)
        else:
            _start_peer(bench, variants, name, floating)


def _start_float(bench: Bench, variants: dict[str, Variant]) -> str | None:
    """The name of the float model, if it could be loaded."""
    given = bench.options.floating
    record = provenance.read(_folder(bench.model))
    source = given or (record.source if record else None)
    if source is None:
        bench.notes.append("The float model is not known; give it with --float MODEL")
        return None
    try:
        if not given:
            provenance.check_here(source, bench.model, "--float")
        variants[FLOAT] = bench.own(FLOAT, source)
    except BadInput as error:
        if given:
            raise
        bench.notes.append(f"The float model was left out ({error.found}); give --float MODEL")
        return None
    return source


def _folder(model: str) -> Path | None:
    return Path(model) if Path(model).is_dir() else None


def _try(bench: Bench, variants: dict[str, Variant], name: str, source: str) -> None:
    try:
        variants[name] = bench.own(name, source)
    except Ended as error:
        bench.notes.append(f"{TITLES[name]} was left out: {error}")


def _start_peer(bench: Bench, variants: dict[str, Variant], name: str, source: str) -> None:
    """Start the variants of another library, in the environment that has it."""
    reason = peers.reason_against(name)
    if reason:
        bench.notes.append(reason)
        return
    for variant in peers.variants(name):
        work = peers.Conversion(variant, source, bench.calls, bench.kept, bench.options.threads)
        try:
            peers.prepare(work, bench.folder / f"{variant}-prepare.log")
            variants[variant] = bench.start(variant, work.command("run"))
        except Ended as error:
            bench.notes.append(f"{peers.TITLES[variant]} was left out: {error}")


def _first_steps(bench: Bench, variants: dict[str, Variant]) -> dict[str, Answer]:
    """The first step of each variant, which builds and compiles; what cannot step is left out."""
    firsts: dict[str, Answer] = {}
    for name, variant in list(variants.items()):
        try:
            answer = variant.ask("steps", calls=[0], forget=False, warm=False)
            firsts[name] = {key: each[0] for key, each in answer.items()}
        except Ended as error:
            if name in (PACKED, PLAIN, FLOAT):
                raise
            bench.notes.append(f"{_title(name)} was left out: {error}")
            variants.pop(name).close()
    return firsts


def _title(name: str) -> str:
    return (TITLES | peers.TITLES)[name]


@dataclass(frozen=True)
class Turns:
    """Seconds of each variant's steps by turn, of the processor ("cpu") and of the wall.

    A turn visits each timestep once. first: whether these are the first visits.
    """

    times: dict[str, list[Answer]]
    first: list[bool]

    @property
    def steps(self) -> int:
        return sum(len(turn["cpu"]) for turn in self.times[PACKED])

    def chosen(self, name: str, *, first: bool) -> list[Answer]:
        pairs = zip(self.times[name], self.first, strict=True)
        return [turn for turn, is_first in pairs if is_first == first]

    def medians(self, name: str, *, first: bool) -> Answer:
        turns = self.chosen(name, first=first)
        return {
            kind: statistics.median(chain.from_iterable(turn[kind] for turn in turns))
            for kind in ("cpu", "wall")
        }

    def ratio(self, name: str, kind: str) -> float | None:
        """How many times as fast as the float model: the median over turns of first visits."""
        if FLOAT not in self.times:
            return None
        pairs = zip(self.chosen(FLOAT, first=True), self.chosen(name, first=True), strict=True)
        return statistics.median(
            statistics.median(slow[kind]) / statistics.median(fast[kind]) for slow, fast in pairs
        )


def _take_turns(
    variants: dict[str, Variant], options: SpeedOptions, firsts: dict[str, Answer]
) -> Turns:
    """All variants in turns, in another order each time."""
    names = list(variants)
    timesteps = variants[PACKED].ask("timesteps")["timesteps"]
    count = 2 * math.ceil(options.repeats / (2 * timesteps))
    turns = Turns({name: [] for name in names}, [number % 2 == 0 for number in range(count)])
    for number in track(range(count), total=count, title="steps in turns"):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            warm = firsts[name]["cpu"] < COLD_MATTERS
            order = {"calls": list(range(timesteps)), "forget": turns.first[number], "warm": warm}
            turns.times[name].append(variants[name].ask("steps", **order))
    return turns


def _parts_repeats(first: Answer) -> int:
    least, most = PARTS_REPEATS
    return max(least, min(most, round(PARTS_SECONDS / first["cpu"])))


def _row(name: str, load: Answer, first: Answer, peak: int, turns: Turns) -> Answer:
    visit = turns.medians(name, first=True)
    later = turns.medians(name, first=False)
    differ = abs(later["cpu"] / visit["cpu"] - 1) > VISITS_DIFFER
    return {
        "variant": name,
        "name": _title(name),
        "cpu": visit["cpu"],
        "wall": visit["wall"],
        "later": later,
        "visits_differ": differ and name == PACKED,
        "ratio_cpu": turns.ratio(name, "cpu"),
        "ratio_wall": turns.ratio(name, "wall"),
        "memory": max(0, peak - load["libraries"]),
        "libraries": load["libraries"],
        "load": load["load"]["wall"],
        "until_first": load["load"]["wall"] + first["wall"],
    }


def _result(bench: Bench, rows: list[Answer], parts: dict[str, Answer], steps: int) -> Answer:
    by_name = {row["variant"]: row for row in rows}
    scaled = {name: scaled_steps(each, by_name[name]["cpu"]) for name, each in parts.items()}
    kinds = {name: by_kind(scaled[name], by_name[name]["cpu"]) for name in scaled}
    products = [step for step in scaled[PACKED] if step["kind"] == PRODUCTS]
    operations = sum(step["operations"] for step in products)
    for name, row in by_name.items():
        seconds = kinds[name][PRODUCTS] if name in kinds else None
        row["rate"] = operations / seconds if seconds else None
        row["outside"] = 1 - seconds / sum(kinds[name].values()) if seconds else None
    return {
        "model": bench.model,
        "batch": bench.options.batch,
        "threads": bench.options.threads,
        "repeats": steps,
        "sets": parts[PACKED]["sets"],
        "operations": operations,
        "peak": parts[PACKED]["peak"],
        "rows": rows,
        "kinds": kinds,
        "layers": [_layer(step) for step in products],
        "torch": _torch_calls(scaled[PACKED]),
        "notes": bench.notes,
    }


def scaled_steps(parts: Answer, whole: float) -> list[Answer]:
    """The parts of a step as they are in a step of `whole` seconds.

    The machine may have been slower while they were timed. The step as a whole was timed beside
    them, so its time says how much.
    """
    factor = whole / parts["whole"]
    return [step | {"seconds": step["seconds"] * factor} for step in parts["steps"]]


def by_kind(steps: Sequence[Answer], whole: float) -> dict[str, float]:
    """Seconds of each kind of work in a step, and what the step takes besides: they add up to it.

    Timed one by one, the parts may take longer than the whole; then there is nothing besides.
    """
    kinds: dict[str, float] = {}
    for step in steps:
        kinds[step["kind"]] = kinds.get(step["kind"], 0.0) + step["seconds"]
    return kinds | {BETWEEN: max(0.0, whole - sum(kinds.values()))}


def _layer(step: Answer) -> Answer:
    names = ("name", "kernel", "reason", "shape", "seconds")
    seconds = step["seconds"]
    rate = step["operations"] / seconds if seconds else None
    return {name: step[name] for name in names} | {"rate": rate}


def _torch_calls(steps: Sequence[Answer]) -> list[Answer]:
    """What runs in torch besides layers, by name: how often, and seconds in all."""
    calls: dict[str, Answer] = {}
    for step in steps:
        if step["kind"] == TORCH:
            call = calls.setdefault(step["name"], {"name": step["name"], "count": 0, "seconds": 0})
            call["count"] += 1
            call["seconds"] += step["seconds"]
    return sorted(calls.values(), key=lambda call: -call["seconds"])
