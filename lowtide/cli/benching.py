"""The commands `lowtide bench quality` and `lowtide bench speed`."""

from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.options import OUTPUT, Change, Device, Json, Model, names, numbers, show
from lowtide.cli.places import on_device
from lowtide.machine.device_names import AUTO
from lowtide.workflows.setting_changes import changed

bench = typer.Typer(help="Measure methods against each other.", no_args_is_help=True)


@bench.command("quality")
def bench_quality(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", help="Where finished cells are kept; run again to go on.")
    ] = Path("runs/quality"),
    methods: Annotated[
        str,
        typer.Option(help="Methods with commas between; tcaq-par leaves PAR out. Default: all."),
    ] = "",
    widths: Annotated[str, typer.Option(help="Such as W4A8,W4A4; default: the papers' nine.")] = "",
    seeds: Annotated[str, typer.Option(help="Calibration seeds, such as 0-2.")] = "0",
    samples: Annotated[
        int, typer.Option(help="Images that are compared with the float model's.")
    ] = 64,
    change: Change = [],  # noqa: B006
    device: Device = AUTO,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Write all kept cells of this model to its section of this file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Every method at every width on one model: errors, what causes them, PSNR, size, minutes."""
    from lowtide.report import text
    from lowtide.workflows import method_ranks, method_table

    cells = method_table.grid(methods, widths, numbers(seeds))
    options = changed({}, change)
    results = method_table.quality(model, out, cells, options, samples, device=on_device(device))
    if markdown:
        method_ranks.write_page(markdown, method_table.finished_cells(out, results[0]))
    show({"cells": results}, as_json, text.table(method_ranks.HEAD, method_ranks.rows(results)))


@bench.command("speed")
def bench_speed(
    run: Annotated[str, typer.Argument(help="A folder that lowtide quantize wrote.")],
    against: Annotated[
        str, typer.Option(help="With commas between: openvino, onnxruntime, torch, compile.")
    ] = "",
    floating: Annotated[
        str | None,
        typer.Option("--float", help="The float model; the one it was made of if not given."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of every variant.")] = 1,
    repeats: Annotated[int, typer.Option(help="Steps of every variant, in turns.")] = 24,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw where the time goes, a PNG or an SVG.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Json = False,
) -> None:
    """The speed of a packed model: beside its float model, layer by layer, beside others."""
    from lowtide.report import speed_tables
    from lowtide.workflows.speed_bench.turns import SpeedOptions, measure_speed

    peers = names(against) or ()
    result = measure_speed(run, SpeedOptions(batch, threads, repeats, peers, floating))
    if picture:
        speed_tables.picture(picture, result)
    show(result, as_json, speed_tables.lines(result))
