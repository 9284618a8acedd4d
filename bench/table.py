"""The README's table: each zoo model in float and at three widths, by the best method there is and by the best peer.

    python bench/table.py [--models zoo:digits,zoo:dit] [--quick]

Runs in lowtide's own environment (extra `metrics`, for the network behind fd-efficientnet) and makes the one of bench/peers.py
for the cells. Finished cells are kept in runs/peers: an interrupted run goes on, --fresh forgets them. Writes
bench/results/table.json (every cell), table.md and the README's table; models and peers that are not asked for (--only lowtide)
stay as they were there.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from peers.cells import (
    PEERS,
    RESULTS,
    ROOT,
    SLACK,
    TORCH,
    Bench,
    Json,
    aloud,
    ask_numbers,
    best,
    home_of,
    install,
    numbers_of,
    usable,
)
from rich.console import Console
from rich.progress import Progress

from lowtide.evaluation.metrics import Extractor, Statistics, frechet, load_extractor
from lowtide.report.progress import COLUMNS

OUT = RESULTS / "table.json"
WIDTHS = ("w8a8", "w4a8", "w4a4")
MODELS = "zoo:digits,zoo:digits-cond,zoo:emoji,zoo:dit,zoo:cifar10-small"
EMOJI = (
    "sleepy face", "cat face", "snowman", "heart", "rocket", "red apple", "tiger face", "pizza",
    "sunflower", "octopus", "penguin", "star", "crown", "guitar", "airplane", "birthday cake",
)  # fmt: skip
CONDITIONS: Json = {
    "zoo:emoji": {"prompts": EMOJI, "guidance": 4.0},
    "zoo:digits-cond": {"labels": range(10), "guidance": 2.0},
    "zoo:dit": {"labels": range(10), "guidance": 2.0},
}
NUMBERS = {"seeds": 64, "steps": 50, "images": 32, "iters": 1000, "rounds": 15, "minutes": 60}
# The recipes that its documentation puts first, or that did best in bench/results/peers.md.
RECIPES = {
    "quanto": ["default optimizer", "HQQ"],
    "torchao": ["PT2E x86", "linears"],
    "sdnq": ["every layer", "every layer, groups of 16"],
    "openvino": ["PTQ", "PTQ, transformer", "compressed weights"],
    "bitsandbytes": ["linears, its own modules"],
}
METHODS = "best"
# How long a cell of lowtide's takes beside one of a peer, roughly, so that the bar's time left means something.
LONGER = 4


class Bar:
    """What runs now and the time left: a bar on a terminal, lines in a log."""

    def __init__(self, progress: Progress, total: int):
        self.progress, self.task, self.cost = (
            progress,
            progress.add_task("starting", total=total),
            0,
        )
        self.silent = progress.console.is_terminal

    def say(self, cell: str) -> None:
        """A cell begins, so the one before it has ended."""
        self.progress.update(self.task, description=cell, advance=self.cost)
        self.cost = cost(cell.split()[0])
        self.silent or aloud(f"{cell} ({self.progress.tasks[0].percentage:.0f} % done)")

    def upto(self, done: int) -> None:
        """Recipes that do not serve a width are never begun."""
        self.progress.update(self.task, completed=done)
        self.cost = 0


@contextmanager
def bar(total: int) -> Iterator[Bar]:
    console = Console(file=sys.stderr)
    with Progress(
        *COLUMNS, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield Bar(progress, total)


def cost(peer: str) -> int:
    return LONGER if peer == "lowtide" else 1


def costs(recipes: dict[str, list[str]]) -> dict[str, int]:
    return {peer: cost(peer) * len(WIDTHS) * len(names) for peer, names in recipes.items()}


def one_model(bench: Bench, shown: Bar, start: int) -> Iterator[Json]:
    """The model's part of the JSON, more complete each time."""
    floating = bench.floating()
    if "cannot" in floating:
        log = bench.home / "float" / "log.txt"
        raise SystemExit(
            f"found {bench.model} unusable ({floating['cannot']}); expected a model that samples; see {log}."
        )
    part = {
        "model": bench.model,
        "conditions": bench.conditions,
        "numbers": bench.numbers,
        "float": floating,
        "cells": [],
    }
    for peer, price in costs(bench.recipes).items():
        part["cells"] += bench.cells(peer)
        start += price
        shown.upto(start)
        yield part


def judged(part: Json, home: Path, extractor: Extractor) -> None:
    """Write the distance to the float model's images into the cells that are shown."""
    reference = seen(extractor, home / "float")
    for width in WIDTHS:
        for cell in filter(None, chosen(part, width)):
            cell["fd"] = frechet(seen(extractor, home / cell["folder"]), reference)


def seen(extractor: Extractor, folder: Path) -> Statistics:
    return extractor.statistics([np.load(folder / "images.npy")])


def as_asked(cell: Json) -> float:
    """The share of weights in layers that hold them, and read their inputs, in no more bits than asked for."""
    if not usable(cell):
        return 0.0
    asked = zip(("weights", "inputs"), cell["bits"].removeprefix("w").split("a"), strict=True)
    return min(narrow(cell["share"][kind], int(bits)) for kind, bits in asked)


def narrow(share: dict[str, float], most: int) -> float:
    return sum(part for bits, part in share.items() if int(bits) <= most or most >= 16)


def fulfils(cell: Json, floating: Json) -> bool:
    """All but the first and the last layer, which may keep 8 bits or float."""
    return as_asked(cell) >= 1 - floating["in_ends"] / floating["weights"] - SLACK


def chosen(part: Json, width: str) -> tuple[Json | None, Json | None]:
    """lowtide's best method and the best peer: by PSNR among those that do what was asked, else whoever does most of it."""
    own = [cell for cell in part["cells"] if cell["bits"] == width]
    groups = (
        [cell for cell in own if (cell["peer"] == "lowtide") == ours] for ours in (True, False)
    )
    ours, theirs = (nearest(group, part["float"]) for group in groups)
    return ours, theirs


def nearest(cells: list[Json], floating: Json) -> Json | None:
    good = [cell for cell in cells if fulfils(cell, floating)]
    if good:
        return max(good, key=lambda cell: cell["psnr"])
    able = [cell for cell in cells if usable(cell)]
    return best(able) if able else None


# One thread computes, so this is what a clock shows on a machine that does nothing else, and it stays true on a busy one.
CLOCK = "processor_seconds"
HEAD = ("model", "bits", "by", "MB", "PSNR dB", "fd-efficientnet", "s a step", "remarks")


def rows(part: Json) -> list[list[str]]:
    """The lines of one model."""
    floating, lines = part["float"], []
    for width in WIDTHS:
        for cell, who in zip(chosen(part, width), ("lowtide", "a peer"), strict=True):
            lines.append(
                [width.upper(), *(line(cell, floating) if cell else missing(part, width, who))]
            )
    first = ["float", "", megabytes(floating), "", "0", float_speed(part), ""]
    return [[part["model"] if not place else "", *row] for place, row in enumerate([first, *lines])]


def line(cell: Json, floating: Json) -> list[str]:
    name = (
        f"**lowtide {cell['recipe']}**"
        if cell["peer"] == "lowtide"
        else f"{PEERS[cell['peer']]}, {cell['recipe']}"
    )
    distance = f"{cell['fd']:.4g}" if "fd" in cell else ""
    remarks = "; ".join(filter(None, (shortcoming(cell, floating), cell["note"])))
    return [name, megabytes(cell), f"{cell['psnr']:.2f}", distance, speed(cell), remarks]


def megabytes(cell: Json) -> str:
    return f"{cell['bytes'] / 1e6:.2f}" if cell["bytes"] else "–"


def speed(cell: Json) -> str:
    """Seconds, and how many times as fast as the float model that ran beside it."""
    theirs, floats = (cell[name][CLOCK] for name in ("seconds_per_step", "float_seconds_per_step"))
    return f"{theirs:.3f} ({floats / theirs:.2f}x)"


def float_speed(part: Json) -> str:
    """Each cell timed the float model anew."""
    found = [cell["float_seconds_per_step"][CLOCK] for cell in part["cells"] if usable(cell)]
    return f"{statistics.median(found):.3f}" if found else ""


def shortcoming(cell: Json, floating: Json) -> str:
    if fulfils(cell, floating):
        return ""
    return f"only {100 * as_asked(cell):.0f} % of the weights are in layers of {cell['bits'].upper()}; none does more"


def missing(part: Json, width: str, who: str) -> list[str]:
    """No cell to show: why, in each peer's words."""
    own = [
        cell
        for cell in part["cells"]
        if cell["bits"] == width and (cell["peer"] == "lowtide") == (who == "lowtide")
    ]
    why = {PEERS[cell["peer"]]: reason(cell) for cell in own}
    return [
        f"no {who.removeprefix('a ')}",
        "",
        "",
        "",
        "",
        "; ".join(f"{name}: {said}" for name, said in why.items()),
    ]


def reason(cell: Json) -> str:
    return cell.get("cannot", "its images are not finite").removeprefix("Unable: ")


HOW = (
    "PSNR and fd-efficientnet (Fréchet distance of EfficientNet-Lite0 features; not FID) are to the float model's images of the "
    "same seeds. A distance of N images is biased upwards by its small N, so it only compares rows of one model. Seconds a step: "
    "of processor time, median of calls on 16 images, one thread, float32 between layers, the float model interleaved in the "
    "same process; the factor is the speed against it (above 1 is faster). MB: the denoiser as its own package saves it. Shown "
    "is the best PSNR among recipes that quantize weights and inputs of all layers as asked, the first and last layer excepted; "
    "the JSON has all."
)


def page(result: Json) -> str:
    """Markdown: how it was made, then one table."""
    lines = [
        [cell.replace("|", "/") for cell in row] for part in result["models"] for row in rows(part)
    ]
    table = [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *lines)]
    found = {
        name: number
        for part in result["models"]
        for cell in part["cells"]
        for name, number in cell["versions"].items()
    }
    made = ", ".join(f"{name} {number}" for name, number in sorted(found.items())) + f", {TORCH}."
    refused = [f"Could not be installed: {name}: {why}" for name, why in result["refused"].items()]
    intro = [
        "# Each zoo model, by the best method and the best peer",
        "",
        HOW,
        "",
        *map(settings, result["models"]),
    ]
    return "\n".join([*intro, "", made, *refused, "", *table]) + "\n"


def settings(part: Json) -> str:
    numbers, given = part["numbers"], json.loads(part["conditions"])
    dealt = {
        name: f"{len(value)} {name}" if isinstance(value, list) else f"{name} {value}"
        for name, value in given.items()
    }
    return (
        f"- {part['model']} (weights {part['float']['fingerprint']}): N = {numbers['seeds']} images of {numbers['steps']} steps"
        f"{''.join(f', {said}' for said in dealt.values())}; calibrated on {numbers['images']} trajectories, lowtide with "
        f"{numbers['iters']} iterations a block."
    )


BEGIN, END = "<!-- bench/table.py writes this table -->", "<!-- end of the table -->"


def condensed(result: Json) -> list[str]:
    """The README's table: without remarks."""
    lines = [row[:-1] for part in result["models"] for row in rows(part)]
    return [f"| {' | '.join(row)} |" for row in (HEAD[:-1], ["---"] * (len(HEAD) - 1), *lines)]


def put_in_readme(result: Json, readme: Path) -> None:
    """Between its two marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text("\n".join([f"{before}{BEGIN}", *condensed(result), f"{END}{after}"]))


def merged(old: Json, part: Json, refused: Json, asked: Collection[str]) -> Json:
    """The table with one model's part in its place, or at the end. Cells of peers that were not asked for stay, if comparable."""
    parts = {each["model"]: each for each in old.get("models", [])}
    before = parts.get(part["model"])
    kept = (
        [cell for cell in before["cells"] if cell["peer"] not in asked]
        if before and comparable(before, part)
        else []
    )
    return {
        "models": list((parts | {part["model"]: part | {"cells": part["cells"] + kept}}).values()),
        "refused": refused,
    }


def comparable(one: Json, other: Json) -> bool:
    """Whether both are of the same float weights, drawn and quantized alike."""
    marks = [
        (each["float"]["fingerprint"], each["conditions"], each["numbers"]) for each in (one, other)
    ]
    return marks[0] == marks[1]


def write(result: Json, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(page(result))
    if out == OUT:
        put_in_readme(result, ROOT / "docs/measured.md")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--methods", default=METHODS, help="of lowtide, to choose the best from")
    parser.add_argument(
        "--only", default=",".join(PEERS), help="lowtide and peers, comma-separated"
    )
    parser.add_argument(
        "--conditions",
        default="{}",
        help='JSON by model: {"zoo:dit": {"labels": [0, 1], "guidance": 2}}',
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--fresh", action="store_true", help="forget finished cells")
    ask_numbers(parser, NUMBERS)
    return parser.parse_args()


def benches(
    given: argparse.Namespace, recipes: dict[str, list[str]], shown: Bar
) -> Iterator[Bench]:
    numbers = numbers_of(given, NUMBERS)
    asked = CONDITIONS | json.loads(given.conditions)
    for model in given.models.split(","):
        conditions = json.dumps(asked.get(model, {}), default=list)
        home = home_of(model, conditions, numbers)
        if given.fresh:
            shutil.rmtree(home, ignore_errors=True)
        yield Bench(model, ",".join(WIDTHS), conditions, numbers, home, recipes, shown.say)


def main() -> None:
    given = arguments()
    extractor, refused = load_extractor("efficientnet"), install()
    every = {"lowtide": given.methods.split(",")} | RECIPES
    recipes = {peer: every[peer] for peer in given.only.split(",")}
    result = json.loads(given.out.read_text()) if given.out.exists() else {}
    price = sum(costs(recipes).values())
    with bar(price * len(given.models.split(","))) as shown:
        for number, bench in enumerate(benches(given, recipes, shown)):
            for part in one_model(bench, shown, number * price):
                judged(part, bench.home, extractor)
                result = merged(result, part, refused, recipes)
                write(result, given.out)
    print(page(result))


if __name__ == "__main__":
    main()
