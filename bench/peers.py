"""lowtide and its peers: the same weights, bits, seeds and metrics for all, on a CPU.

    python bench/peers.py [--model zoo:digits] [--bits w8a8,w4a8,...] [--only quanto] [--quick]

It needs nothing but Python. It makes bench/.venv-peers, installs lowtide and every line of
requirements-peers.txt there, and runs each recipe of bench/peers/*.py in a process of its own, so
that a crash ends one cell and not the run. Finished cells are kept in runs/peers: an interrupted
run continues, and --fresh removes them. It writes bench/results/peers.json (every recipe) and
peers.md (the best of each peer). Peers that are left out (--only lowtide) keep their rows.
"""

import argparse
import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from peers.cells import (
    PEERS,
    RESULTS,
    SLACK,
    Bench,
    Json,
    ask_numbers,
    best,
    home_of,
    install,
    numbers_of,
    usable,
    versions_of,
)

BITS = "w8a8,w4a8,w4a16,w3a16,w2a16"
NUMBERS = {"seeds": 64, "steps": 50, "images": 32, "iters": 1000, "rounds": 15, "minutes": 30}


def spread(share: dict[str, float]) -> str:
    """Such as "4: 99.9 %, 8: 0.1 %"."""
    named = {("float" if int(bits) >= 16 else bits): part for bits, part in share.items()}
    return ", ".join(f"{bits}: {100 * part:.3g} %" for bits, part in named.items())


def line(cell: Json, others: list[Json]) -> list[str]:
    """One row of the table."""
    who = lowtide_name(cell) if cell["peer"] == "lowtide" else PEERS[cell["peer"]]
    if not usable(cell):
        reason = cell.get("cannot", "its images are not finite")
        return [who, cell["recipe"], "cannot", "", "", "", "", reason]
    seconds = cell["seconds_per_step"]["seconds"]
    float_seconds = cell["float_seconds_per_step"]["seconds"]
    speed = f"{seconds:.3f} ({float_seconds / seconds:.2f}x)"
    size = f"{cell['bytes'] / 1e6:.2f}" if cell["bytes"] else "–"
    shares = [spread(cell["share"][kind]) for kind in ("weights", "inputs")]
    return [who, cell["recipe"], f"{cell['psnr']:.2f}", speed, size, *shares, remarks(cell, others)]


def lowtide_name(cell: Json) -> str:
    return f"**lowtide {cell['recipe']}**"


def remarks(cell: Json, others: list[Json]) -> str:
    failed = [f"{other['recipe']}: {other['cannot']}" for other in others if "cannot" in other]
    left = len(cell["left"])
    in_float = f"{left} of {cell['layers']} layers' weights in float" if left else ""
    width = int(cell["bits"][1])
    shares = cell["share"]["weights"].items()
    more = sum(part for bits, part in shares if width < int(bits) < 16)
    wider = f"{100 * more:.0f} % of weights in more bits than asked" if more > SLACK else ""
    return "; ".join(filter(None, (in_float, wider, cell["note"], cell.get("save", ""), *failed)))


HEAD = (
    "who",
    "recipe",
    "PSNR dB",
    "s a step (x float)",
    "MB",
    "weights' bits",
    "inputs' bits",
    "remarks",
)


def table(cells: list[Json], bits: str) -> list[str]:
    """The rows at one number of bits: each method of lowtide, and the best recipe of each peer."""
    own = [cell for cell in cells if cell["bits"] == bits]
    rows = [line(cell, []) for cell in own if cell["peer"] == "lowtide"]
    groups = [[cell for cell in own if cell["peer"] == peer] for peer in PEERS if peer != "lowtide"]
    rows += [line(best(group), group) for group in groups if group]
    rows = [[text.replace("|", "/") for text in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows)]
    return [f"### {bits.upper()}", "", *lines, ""]


HOW = (
    "Seconds a step: median of calls on 16 images, one thread, float32 between layers, interleaved "
    "with the float model in the same process; the factor is the speed against it (above 1 is "
    "faster). A peer's first and last layer may keep 8 bits; of lowtide's the weights do, the "
    "inputs are float. Of a peer's recipes the one that quantizes most is shown, the best PSNR "
    "among equals; the JSON has them all."
)


def page(result: Json) -> str:
    numbers = result["numbers"]
    floating = result["float"]
    convolved = 100 * floating["in_convolutions"] / floating["weights"]
    what = (
        f"{numbers['seeds']} images from the same seeds, {numbers['steps']} steps, PSNR to the "
        f"float model's images. The float denoiser (weights {floating['fingerprint']}) takes "
        f"{floating['bytes'] / 1e6:.2f} MB on disk; {convolved:.0f} % of the weights of its "
        f"{floating['layers']} layers are in convolutions. Calibration, where a peer has one: the "
        f"same {numbers['images']} trajectories. {HOW} lowtide ran {numbers['iters']} iterations a "
        "block."
    )
    made = versions_of(result["cells"])
    intro = [f"# {result['model']}: lowtide and its peers", "", what, "", made, ""]
    intro += [f"Could not be installed: {name}: {why}" for name, why in result["refused"].items()]
    lines = intro
    for bits in dict.fromkeys(cell["bits"] for cell in result["cells"]):
        lines += table(result["cells"], bits)
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:digits")
    parser.add_argument("--bits", default=BITS)
    parser.add_argument("--only", default=",".join(PEERS), help="peers, comma-separated")
    parser.add_argument("--methods", default="minmax,best", help="of lowtide, comma-separated")
    parser.add_argument(
        "--conditions", default="{}", help='JSON, such as {"labels": [0, 1], "guidance": 4}'
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--fresh", action="store_true", help="forget finished cells")
    ask_numbers(parser, NUMBERS)
    return parser.parse_args()


def prepared(options: argparse.Namespace) -> Bench:
    numbers = numbers_of(options, NUMBERS)
    home = home_of(options.model, options.conditions, numbers)
    if options.fresh:
        shutil.rmtree(home, ignore_errors=True)
    recipes = {"lowtide": options.methods.split(",")}
    return Bench(options.model, options.bits, options.conditions, numbers, home, recipes)


def main() -> None:
    options = arguments()
    bench = prepared(options)
    refused = install()
    result = {
        "model": options.model,
        "numbers": bench.numbers,
        "float": bench.usable_float(),
        "refused": refused,
        "cells": [],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    older = kept(options.out, result, options.only.split(","))
    for peer in options.only.split(","):
        result["cells"] += bench.cells(peer)
        whole = result | {"cells": in_order([*result["cells"], *older])}
        options.out.write_text(json.dumps(whole, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page(whole))
    print(options.out.with_suffix(".md").read_text())


def kept(out: Path, result: Json, peers: Collection[str]) -> list[Json]:
    """The cells of peers that do not run, if they are of the same float weights and numbers."""
    before = json.loads(out.read_text()) if out.exists() else {}

    def identity(each: Json) -> tuple:
        return each["model"], each["numbers"], each["float"]["fingerprint"]

    if not before or identity(before) != identity(result):
        return []
    return [cell for cell in before["cells"] if cell["peer"] not in peers]


def in_order(cells: Sequence[Json]) -> list[Json]:
    """Peer by peer, in the order of PEERS."""
    return sorted(cells, key=lambda cell: list(PEERS).index(cell["peer"]))


if __name__ == "__main__":
    main()
