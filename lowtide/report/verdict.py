"""The verdict of a comparison in the terminal: one column for each model, and a line for each gate that failed."""

import shutil
import sys
from collections.abc import Iterable
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowtide.report.text import size

Json = dict[str, Any]
NARROWEST = 100
SPOKEN = {"psnr": "PSNR", "lpips": "LPIPS", "fd-increase": "FD increase"}


def lines(evidence: Json) -> list[str]:
    """The table, and where the rest lies."""
    return [*rendered(table(evidence)), f"report: {evidence['report']}"]


def rendered(found: Table) -> list[str]:
    """In colour where somebody looks, plain where a file or a pipe does."""
    width = max(NARROWEST, shutil.get_terminal_size().columns)
    console = Console(file=StringIO(), width=width, force_terminal=sys.stdout.isatty())
    console.print(found)
    return console.file.getvalue().rstrip().splitlines()


def table(evidence: Json) -> Table:
    """Models across, what was measured down."""
    models, reference = list(evidence["models"].values()), evidence["models"][evidence["reference"]]
    found = Table(title=Text(evidence["title"]), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    found.add_column("")
    for model in models:
        found.add_column(Text(model["name"]), justify="right")
    found.add_row("size on disk", *(weight(model, reference) for model in models))
    found.add_row("seconds a step", *(pace(model, reference) for model in models))
    for name in dict.fromkeys(name for model in reversed(models) for name in model["metrics"]):
        found.add_row(heading(name), *(measure(model["metrics"].get(name)) for model in models))
    found.add_row("drift of the last sample", *(map(end, models)))
    return found


def heading(name: str) -> str:
    return {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "latent_mse": "latent MSE"}.get(name, name)


def weight(model: Json, reference: Json) -> str:
    return size(model["bytes"]) + ratio(model["bytes"], reference["bytes"], model is reference)


def pace(model: Json, reference: Json) -> str:
    mine, theirs = (each["seconds_per_step"] for each in (model, reference))
    return f"{mine:.3g}" + ratio(mine, theirs, model is reference)


def ratio(mine: float, theirs: float, same: bool) -> str:
    return "" if same else f" ({mine / theirs:.2f}x)"


def measure(found: Json | None) -> str:
    """The value, and the interval that it lies in."""
    if found is None or found["value"] is None:
        return ""
    interval = "" if found.get("low") is None else f" ({found['low']:.4g} to {found['high']:.4g})"
    return f"{found['value']:.4g}{interval}"


def end(model: Json) -> str:
    """Relative L2 of the last sample."""
    path = model.get("trajectory")
    return f"{path['error'][-1]:.3g}" if path else ""


def failures(evidence: Json) -> list[str]:
    """One sentence for each gate that was not kept."""
    return [sentence(gate, evidence["models"]) for gate in failed(evidence["gates"])]


def failed(gates: Iterable[Json]) -> list[Json]:
    return [gate for gate in gates if not gate["passed"]]


def sentence(gate: Json, models: Json) -> str:
    bound, _, metric = gate["name"].partition("-")
    kind = "at least" if bound == "min" else "at most"
    value = "no number" if gate["value"] is None else f"{gate['value']:.4g}"
    return f"gate failed: {models[gate['model']]['name']}: {SPOKEN.get(metric, metric)} {value}, {kind} {gate['limit']:g} asked"
