"""Peers side by side: the same weights, bits, seeds and metrics for lowtide and for what else can quantize a denoiser on a CPU.

    python bench/peers.py [--model zoo:digits] [--bits w8a8,w4a8,...] [--only quanto,torchao] [--quick]

Needs nothing but Python: it makes bench/.venv-peers, installs lowtide and every line of requirements-peers.txt there, and runs
each recipe of bench/peers/*.py in a process of its own, so that a crash is a cell and not the end. Finished cells are kept in
runs/peers: an interrupted run goes on, and --fresh forgets them. Writes bench/results/peers.json (every recipe) and peers.md
(the best of each).
"""

import argparse
import json
import shutil
from pathlib import Path

from peers.cells import (
    PEERS,
    RESULTS,
    SLACK,
    TORCH,
    Bench,
    Json,
    ask_numbers,
    best,
    home_of,
    install,
    numbers_of,
    usable,
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
        return [
            who,
            cell["recipe"],
            "cannot",
            "",
            "",
            "",
            "",
            cell.get("cannot", "its images are not finite"),
        ]
    theirs, ours = (cell[name] for name in ("seconds_per_step", "float_seconds_per_step"))
    speed = f"{theirs['seconds']:.3f} ({ours['seconds'] / theirs['seconds']:.2f}x)"
    size = f"{cell['bytes'] / 1e6:.2f}" if cell["bytes"] else "–"
    shares = [spread(cell["share"][kind]) for kind in ("weights", "inputs")]
    return [who, cell["recipe"], f"{cell['psnr']:.2f}", speed, size, *shares, remarks(cell, others)]


def lowtide_name(cell: Json) -> str:
    return f"**lowtide {cell['recipe']}**"


def remarks(cell: Json, others: list[Json]) -> str:
    failed = [f"{other['recipe']}: {other['cannot']}" for other in others if "cannot" in other]
    left = (
        f"{len(cell['left'])} of {cell['layers']} layers' weights in float" if cell["left"] else ""
    )
    more = sum(
        part
        for bits, part in cell["share"]["weights"].items()
        if int(cell["bits"][1]) < int(bits) < 16
    )
    wider = f"{100 * more:.0f} % of weights in more bits than asked" if more > SLACK else ""
    return "; ".join(filter(None, (left, wider, cell["note"], cell.get("save", ""), *failed)))


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


def table(found: list[Json], bits: str) -> list[str]:
    """The rows at one number of bits: lowtide's methods each, and the best recipe of each peer."""
    own = [cell for cell in found if cell["bits"] == bits]
    rows = [line(cell, []) for cell in own if cell["peer"] == "lowtide"]
    groups = [[cell for cell in own if cell["peer"] == peer] for peer in PEERS if peer != "lowtide"]
    rows += [line(best(group), group) for group in groups if group]
    rows = [[text.replace("|", "/") for text in row] for row in rows]
    return [
        f"### {bits.upper()}",
        "",
        *(f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows)),
        "",
    ]


HOW = (
    "Seconds a step: median of calls on 16 images, one thread, float32 between layers, interleaved with the float model in the "
    "same process; the factor is the speed against it (above 1 is faster). A peer's first and last layer may keep 8 bits; of "
    "lowtide's the weights do, the inputs are float. Of a peer's recipes the one that quantizes most is shown, the best PSNR "
    "among equals; the JSON has them all."
)


def page(result: Json) -> str:
    numbers, model, floating = result["numbers"], result["model"], result["float"]
    versions = {
        name: number for cell in result["cells"] for name, number in cell["versions"].items()
    }
    convolved = 100 * floating["in_convolutions"] / floating["weights"]
    what = (
        f"{numbers['seeds']} images from the same seeds, {numbers['steps']} steps, PSNR to the float model's images. The float "
        f"denoiser (weights {floating['fingerprint']}) takes {floating['bytes'] / 1e6:.2f} MB on disk; {convolved:.0f} % of the "
        f"weights of its {floating['layers']} layers are in convolutions. Calibration, where a peer has one: the same "
        f"{numbers['images']} trajectories. {HOW} lowtide ran {numbers['iters']} iterations a block."
    )
    made = (
        ", ".join(f"{name} {number}" for name, number in sorted(versions.items())) + f", {TORCH}."
    )
    intro = [f"# {model}: lowtide and its peers", "", what, "", made, ""]
    intro += [f"Could not be installed: {name}: {why}" for name, why in result["refused"].items()]
    bits = list(dict.fromkeys(cell["bits"] for cell in result["cells"]))
    return "\n".join([*intro, *(row for each in bits for row in table(result["cells"], each))])


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


def prepared(given: argparse.Namespace) -> Bench:
    numbers = numbers_of(given, NUMBERS)
    home = home_of(given.model, given.conditions, numbers)
    if given.fresh:
        shutil.rmtree(home, ignore_errors=True)
    return Bench(
        given.model,
        given.bits,
        given.conditions,
        numbers,
        home,
        {"lowtide": given.methods.split(",")},
    )


def main() -> None:
    given = arguments()
    bench, refused = prepared(given), install()
    floating = bench.floating()
    if "cannot" in floating:
        log = bench.home / "float" / "log.txt"
        raise SystemExit(
            f"found {given.model} unusable ({floating['cannot']}); expected a model that samples; see {log}."
        )
    result = {
        "model": given.model,
        "numbers": bench.numbers,
        "float": floating,
        "refused": refused,
        "cells": [],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for peer in given.only.split(","):
        result["cells"] += bench.cells(peer)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
