"""The README's table: each zoo model in float and at three widths, by lowtide and by the best peer.

    python bench/table.py [--models zoo:digits,zoo:dit] [--quick]

It runs in lowtide's own environment (with the extra `metrics`, for the network behind
fd-efficientnet), and makes the environment of bench/peers.py for the cells. Finished cells are kept
in runs/peers: an interrupted run continues, and --fresh removes them. It writes
bench/results/table.json (every cell), table.md and the README's table. Models and peers that are
left out (--only lowtide) keep their rows.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from peers.cells import (
    PEERS,
    RESULTS,
    ROOT,
    SLACK,
    Bench,
    Json,
    aloud,
    ask_numbers,
    best,
    home_of,
    install,
    numbers_of,
    usable,
    versions_of,
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
# A cell of lowtide takes about this many times as long as one of a peer; for the bar's time left.
LONGER = 4


class Bar:
    """The running cell and the time left: a bar on a terminal, lines in a log."""

    def __init__(self, progress: Progress, total: int):
        self.progress = progress
        self.task = progress.add_task("starting", total=total)
        self.cost = 0
        self.silent = progress.console.is_terminal

    def say(self, cell: str) -> None:
        """A cell begins, so the one before it has ended."""
        self.progress.update(self.task, description=cell, advance=self.cost)
        self.cost = cost(cell.split()[0])
        if not self.silent:
            aloud(f"{cell} ({self.progress.tasks[0].percentage:.0f} % done)")

    def upto(self, done: int) -> None:
        """Count recipes that do not serve a width, and so never begin, as done."""
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
    part = {
        "model": bench.model,
        "conditions": bench.conditions,
        "numbers": bench.numbers,
        "float": bench.usable_float(),
        "cells": [],
    }
    for peer, price in costs(bench.recipes).items():
        part["cells"] += bench.cells(peer)
        start += price
        shown.upto(start)
        yield part


def judged(part: Json, home: Path, extractor: Extractor) -> None:
    """Write the distance to the float model's images into the cells that are shown."""
    reference = statistics_of(extractor, home / "float")
    for width in WIDTHS:
        for cell in filter(None, chosen(part, width)):
            cell["fd"] = frechet(statistics_of(extractor, home / cell["folder"]), reference)


def statistics_of(extractor: Extractor, folder: Path) -> Statistics:
    return extractor.statistics([np.load(folder / "images.npy")])


def as_asked(cell: Json) -> float:
    """The share of weights in layers whose weights and inputs have at most the cell's bits."""
    if not usable(cell):
        return 0.0
    weights, inputs = cell["bits"].removeprefix("w").split("a")
    share = cell["share"]
    return min(narrow(share["weights"], int(weights)), narrow(share["inputs"], int(inputs)))


def narrow(share: dict[str, float], most: int) -> float:
    return sum(part for bits, part in share.items() if int(bits) <= most or most >= 16)


def fulfils(cell: Json, floating: Json) -> bool:
    """All but the first and the last layer, which may keep 8 bits or float."""
    return as_asked(cell) >= 1 - floating["in_ends"] / floating["weights"] - SLACK


def chosen(part: Json, width: str) -> tuple[Json | None, Json | None]:
    """lowtide's best method and the best peer."""
    own = [cell for cell in part["cells"] if cell["bits"] == width]
    ours = [cell for cell in own if cell["peer"] == "lowtide"]
    theirs = [cell for cell in own if cell["peer"] != "lowtide"]
    return nearest(ours, part["float"]), nearest(theirs, part["float"])


def nearest(cells: list[Json], floating: Json) -> Json | None:
    """The best PSNR among cells that quantize as their bits say, else the closest to that."""
    good = [cell for cell in cells if fulfils(cell, floating)]
    if good:
        return max(good, key=lambda cell: cell["psnr"])
    able = [cell for cell in cells if usable(cell)]
    return best(able) if able else None


# One thread computes, so processor time is what a clock shows on an idle machine. Unlike the
# clock, it stays the same on a busy one.
CLOCK = "processor_seconds"
HEAD = ("model", "bits", "by", "MB", "PSNR dB", "fd-efficientnet", "s a step", "remarks")


def rows(part: Json) -> list[list[str]]:
    """The lines of one model."""
    floating = part["float"]
    lines = [[part["model"], "float", "", megabytes(floating), "", "0", float_speed(part), ""]]
    for width in WIDTHS:
        for cell, who in zip(chosen(part, width), ("lowtide", "a peer"), strict=True):
            columns = line(cell, floating) if cell else missing(part, width, who)
            lines.append(["", width.upper(), *columns])
    return lines


def line(cell: Json, floating: Json) -> list[str]:
    name = f"{PEERS[cell['peer']]}, {cell['recipe']}"
    if cell["peer"] == "lowtide":
        name = f"**lowtide {cell['recipe']}**"
    distance = f"{cell['fd']:.4g}" if "fd" in cell else ""
    remarks = "; ".join(filter(None, (shortcoming(cell, floating), cell["note"])))
    return [name, megabytes(cell), f"{cell['psnr']:.2f}", distance, speed(cell), remarks]


def megabytes(cell: Json) -> str:
    return f"{cell['bytes'] / 1e6:.2f}" if cell["bytes"] else "–"


def speed(cell: Json) -> str:
    """Seconds, and how many times as fast as the float model that ran beside it."""
    seconds = cell["seconds_per_step"][CLOCK]
    float_seconds = cell["float_seconds_per_step"][CLOCK]
    return f"{seconds:.3f} ({float_seconds / seconds:.2f}x)"


def float_speed(part: Json) -> str:
    """The median over the cells, each of which times the float model anew."""
    seconds = [cell["float_seconds_per_step"][CLOCK] for cell in part["cells"] if usable(cell)]
    return f"{statistics.median(seconds):.3f}" if seconds else ""


def shortcoming(cell: Json, floating: Json) -> str:
    if fulfils(cell, floating):
        return ""
    share = f"{100 * as_asked(cell):.0f} %"
    return f"only {share} of the weights are in layers of {cell['bits'].upper()}; none does more"


def missing(part: Json, width: str, who: str) -> list[str]:
    """The columns where there is no cell to show: each peer's reason."""
    cells = [cell for cell in part["cells"] if cell["bits"] == width]
    own = [cell for cell in cells if (cell["peer"] == "lowtide") == (who == "lowtide")]
    reasons = {PEERS[cell["peer"]]: reason(cell) for cell in own}
    remarks = "; ".join(f"{name}: {text}" for name, text in reasons.items())
    return [f"no {who.removeprefix('a ')}", "", "", "", "", remarks]


def reason(cell: Json) -> str:
    return cell.get("cannot", "its images are not finite").removeprefix("Unable: ")


HOW = (
    "PSNR and fd-efficientnet (Fréchet distance of EfficientNet-Lite0 features; not FID) are to "
    "the float model's images of the same seeds. A distance of N images is biased upwards by its "
    "small N, so it only compares rows of one model. Seconds a step: of processor time, median of"
    " calls on 16 images, one thread, float32 between layers, the float model interleaved in the "
    "same process; the factor is the speed against it (above 1 is faster). MB: the denoiser as "
    "its own package saves it. Shown is the best PSNR among recipes that quantize weights and "
    "inputs of all layers as asked, the first and last layer excepted; the JSON has all."
)


def page(result: Json) -> str:
    """Markdown: how it was made, then one table."""
    lines = [[text.replace("|", "/") for text in row] for row in all_rows(result)]
    table = [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *lines)]
    made = versions_of(list(chain.from_iterable(part["cells"] for part in result["models"])))
    refused = [f"Could not be installed: {name}: {why}" for name, why in result["refused"].items()]
    intro = [
        "# Each zoo model, by the best method and the best peer",
        "",
        HOW,
        "",
        *map(settings, result["models"]),
    ]
    return "\n".join([*intro, "", made, *refused, "", *table]) + "\n"


def all_rows(result: Json) -> list[list[str]]:
    return list(chain.from_iterable(rows(part) for part in result["models"]))


def settings(part: Json) -> str:
    """One line on how a model was drawn and quantized."""
    numbers = part["numbers"]
    conditions = [
        f"{len(value)} {name}" if isinstance(value, list) else f"{name} {value}"
        for name, value in json.loads(part["conditions"]).items()
    ]
    images = ", ".join([f"N = {numbers['seeds']} images of {numbers['steps']} steps", *conditions])
    return (
        f"- {part['model']} (weights {part['float']['fingerprint']}): {images}; "
        f"calibrated on {numbers['images']} trajectories, "
        f"lowtide with {numbers['iters']} iterations a block."
    )


BEGIN = "<!-- bench/table.py writes this table -->"
END = "<!-- end of the table -->"


def condensed(result: Json) -> list[str]:
    """The README's table: without remarks."""
    lines = [row[:-1] for row in all_rows(result)]
    return [f"| {' | '.join(row)} |" for row in (HEAD[:-1], ["---"] * (len(HEAD) - 1), *lines)]


def put_in_readme(result: Json, readme: Path) -> None:
    """Between its two marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text("\n".join([f"{before}{BEGIN}", *condensed(result), f"{END}{after}"]))


def merged(old: Json, part: Json, refused: Json, peers: Collection[str]) -> Json:
    """The table with one model's part in its place, or at the end.

    Older cells of peers that did not run stay, if they are comparable.
    """
    parts = {each["model"]: each for each in old.get("models", [])}
    before = parts.get(part["model"])
    cells = part["cells"]
    if before and comparable(before, part):
        cells = cells + [cell for cell in before["cells"] if cell["peer"] not in peers]
    parts[part["model"]] = part | {"cells": cells}
    return {"models": list(parts.values()), "refused": refused}


def comparable(one: Json, other: Json) -> bool:
    """Whether both are of the same float weights, drawn and quantized alike."""

    def identity(part: Json) -> tuple:
        return part["float"]["fingerprint"], part["conditions"], part["numbers"]

    return identity(one) == identity(other)


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
    by_model = 'JSON by model: {"zoo:dit": {"labels": [0, 1], "guidance": 2}}'
    parser.add_argument("--conditions", default="{}", help=by_model)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--fresh", action="store_true", help="forget finished cells")
    ask_numbers(parser, NUMBERS)
    return parser.parse_args()


def benches(
    options: argparse.Namespace, recipes: dict[str, list[str]], shown: Bar
) -> Iterator[Bench]:
    numbers = numbers_of(options, NUMBERS)
    by_model = CONDITIONS | json.loads(options.conditions)
    for model in options.models.split(","):
        conditions = json.dumps(by_model.get(model, {}), default=list)
        home = home_of(model, conditions, numbers)
        if options.fresh:
            shutil.rmtree(home, ignore_errors=True)
        yield Bench(model, ",".join(WIDTHS), conditions, numbers, home, recipes, shown.say)


def main() -> None:
    options = arguments()
    extractor = load_extractor("efficientnet")
    refused = install()
    every = {"lowtide": options.methods.split(",")} | RECIPES
    recipes = {peer: every[peer] for peer in options.only.split(",")}
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    price = sum(costs(recipes).values())
    with bar(price * len(options.models.split(","))) as shown:
        for number, bench in enumerate(benches(options, recipes, shown)):
            for part in one_model(bench, shown, number * price):
                judged(part, bench.home, extractor)
                result = merged(result, part, refused, recipes)
                write(result, options.out)
    print(page(result))


if __name__ == "__main__":
    main()
