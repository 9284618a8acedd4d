"""The commands: each is one call. Results go to stdout, progress and complaints to stderr.

What needs torch or diffusers is imported inside a command: both take seconds, and --help must not
wait for them.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowtide import __version__
from lowtide.cli.demonstrating import demo
from lowtide.cli.exporting_runs import export
from lowtide.cli.options import (
    OUTPUT,
    Device,
    Json,
    Out,
    Sampler,
    Spacing,
    names,
    numbers,
    options_of,
    show,
    values,
)
from lowtide.cli.places import check_one_process, on_device
from lowtide.cli.recalibrating import recalibrate
from lowtide.cli.verifying import verify
from lowtide.machine.device_names import AUTO
from lowtide.settings import MACHINE, EvaluationSettings, MethodName, Request, Settings
from lowtide.workflows.setting_changes import changed

if TYPE_CHECKING:
    from lowtide.evaluation.comparison import Evaluation

app = typer.Typer(
    help="Quantize diffusion models and keep their sense of time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
bench = typer.Typer(help="Measure methods against each other.", no_args_is_help=True)
app.add_typer(bench, name="bench", rich_help_panel="Develop")

MAKE = "Quantize"
USE = "Use"
MEASURE = "Measure"
DEVELOP = "Develop"
MODEL = "Model"

Model = Annotated[str, typer.Argument(help="A hub id, a local diffusers folder, or zoo:NAME.")]
Method = Annotated[MethodName, typer.Option(help="See `lowtide methods`.", rich_help_panel=MODEL)]
Without = Annotated[
    list[str],
    typer.Option(
        help="A stage to leave out, such as tiar; give it once for each.", rich_help_panel=MODEL
    ),
]
Change = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="Change a setting, iters=500, or a stage's option, omq.plus=true; once for each.",
        rich_help_panel=MODEL,
    ),
]
FuseLora = Annotated[str | None, typer.Option(help="A LoRA to add to the weights first, a file.")]
Reference = Annotated[
    str | None, typer.Option(help="The float model to compare with.", rich_help_panel=MODEL)
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lowtide {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize diffusion models and keep their sense of time."""
    check_one_process(context.invoked_subcommand)


@app.command(rich_help_panel=MAKE)
@options_of(Settings)
def quantize(
    model: Model,
    out: Out,
    method: Method = "best",
    without: Without = [],  # noqa: B006 - typer copies it
    change: Change = [],  # noqa: B006
    fuse_lora: FuseLora = None,
    as_json: Json = False,
    **options: object,
) -> None:
    """Quantize a model and save it as a diffusers folder."""
    from lowtide.report import text
    from lowtide.workflows.to_folder import quantize_to_folder

    settings = changed(values(options), change)
    settings["device"] = on_device(settings["device"])
    settings["without"] = tuple(without)
    result = quantize_to_folder(model, out, method, settings, fuse_lora)
    show(result, as_json, text.quantized(result))


@app.command(rich_help_panel=MAKE)
@options_of(Settings)
def plan(
    model: Model,
    fit: Annotated[
        str | None,
        typer.Option(
            help="The most bits per weight, of 8,6,4,3,2, within this size, such as 4GiB.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            help="Reckon for a card that is not here, such as rtx4090, h200 or t4.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    method: Method = "best",
    without: Without = [],  # noqa: B006
    change: Change = [],  # noqa: B006
    as_json: Json = False,
    **options: object,
) -> None:
    """Say before anything runs what quantize would take: size, memory and time by stage.

    With --device or --card also the memory on an accelerator, and how the model would lie there.
    """
    from lowtide.estimate import plan as estimate
    from lowtide.estimate.on_card import target_of
    from lowtide.report import text

    settings = changed(values(options), change)
    target = target_of(settings["device"], card)
    print(f"device: {target.described if target else 'cpu'}", file=sys.stderr)
    prediction = estimate(
        model, method=method, fit=fit, card=card, without=tuple(without), **settings
    )
    result = prediction.as_json()
    show(result, as_json, text.estimated(result))


@app.command(rich_help_panel=MAKE)
def reschedule(
    model: Annotated[
        Path,
        typer.Argument(help="A folder that lowtide quantize wrote, without --only-schedule."),
    ],
    out: Out,
    steps: Annotated[int, typer.Option("--steps", help="Sampling steps of the new schedule.")],
    scheduler: Sampler = None,
    spacing: Spacing = None,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Make another schedule a packed model's own, without quantizing again."""
    from lowtide.checkpoint.rescheduling import reschedule_to_folder
    from lowtide.report import text

    options = {"scheduler": scheduler, "spacing": spacing, "device": on_device(device)}
    result = reschedule_to_folder(model, out, steps, **options)
    show(result, as_json, text.rescheduled(result))


app.command(rich_help_panel=MAKE)(recalibrate)


@app.command(rich_help_panel=MAKE)
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A .ckpt or .safetensors file of CompVis' latent-diffusion.")
    ],
    config: Annotated[Path, typer.Option("--config", help="The YAML that it was trained with.")],
    out: Out,
    ema: Annotated[
        bool, typer.Option(help="Take the moving average of the weights, where there is one.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Convert a latent-diffusion checkpoint, class-conditional or not, to a diffusers folder."""
    from lowtide.report import text
    from lowtide.workflows.compvis import convert_to_folder

    result = convert_to_folder(checkpoint, config, out, ema=ema)
    show(result, as_json, text.converted(result))


@app.command(rich_help_panel=USE)
@options_of(Request, seeds="0-15", steps=None)
def sample(
    model: Model, out: Out, device: Device = AUTO, as_json: Json = False, **options: object
) -> None:
    """Draw images from a float or packed model, one PNG per seed and a grid."""
    from lowtide.workflows.to_folder import sample_to_folder

    given = {name: value for name, value in values(options).items() if value is not None}
    own_steps = "steps" not in given
    request = Request(**given)
    result = sample_to_folder(model, out, request, on_device(device), own_steps=own_steps)
    line = (
        f"{result['images']} images of {result['steps']} steps in {out}, "
        f"{result['seconds_per_step']} s a step"
    )
    show(result, as_json, [line])


def _verdict(evaluation: "Evaluation", as_json: bool) -> None:
    """Print the measurements; a gate that failed is a line on stderr and exit code 1."""
    from lowtide.report import verdict

    lines = [*verdict.lines(evaluation.evidence), f"report: {evaluation.report}"]
    show(evaluation.as_json(), as_json, lines)
    failures = verdict.failures(evaluation.evidence)
    for line in failures:
        print(line, file=sys.stderr)
    if failures:
        raise typer.Exit(1)


@app.command(rich_help_panel=MEASURE)
@options_of(EvaluationSettings)
def evaluate(
    run: Annotated[str, typer.Argument(help="A folder that lowtide quantize wrote.")],
    reference: Reference = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Where the evidence goes; RUN/evidence if not given.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: Json = False,
    **options: object,
) -> None:
    """Measure a quantized model against the float model: metrics, errors, report.html."""
    from lowtide.evaluation import comparison

    settings = EvaluationSettings(**values(options))
    settings = replace(settings, device=on_device(settings.device))
    evaluation = comparison.evaluate_model(run, settings, reference=reference, out=out)
    _verdict(evaluation, as_json)


@app.command(rich_help_panel=MEASURE)
@options_of(EvaluationSettings)
def compare(
    models: Annotated[
        list[str],
        typer.Argument(help="Any mix of float models, lowtide's and other checkpoints."),
    ],
    reference: Reference = None,
    out: Out = Path("evidence"),
    as_json: Json = False,
    **options: object,
) -> None:
    """Measure any models side by side, with the same evidence and gates as evaluate."""
    from lowtide.evaluation import comparison

    settings = EvaluationSettings(**values(options))
    settings = replace(settings, device=on_device(settings.device))
    evaluation = comparison.compare_models(models, settings, reference=reference, out=out)
    _verdict(evaluation, as_json)


@app.command(rich_help_panel=USE)
def inspect(model: Model, as_json: Json = False) -> None:
    """Show units, the temporal block, layers, bits and bytes."""
    from lowtide.checkpoint import facts
    from lowtide.report import text

    result = facts.inspect(model)
    show(result, as_json, text.inspected(result))


@app.command(rich_help_panel=MAKE)
def methods(as_json: Json = False) -> None:
    """List the methods and the papers behind them."""
    from lowtide.methods import methods as all_methods

    rows = all_methods()
    show({"methods": rows}, as_json, [f"{row['name']:<14} {row['what']}" for row in rows])


@app.command("run", rich_help_panel=MAKE)
def run_recipe(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, such as recipes/sd14.toml.")],
    row: Annotated[
        str | None, typer.Argument(help="A row of it, such as w4a8-tfmq; not needed if it has one.")
    ] = None,
    *,
    out: Out,
    change: Change = [],  # noqa: B006
    without: Without = [],  # noqa: B006
    model: Annotated[
        str | None, typer.Option(help="Another model than the recipe names.", rich_help_panel=MODEL)
    ] = None,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Run a row of a recipe file: a model, a method and settings, written down."""
    from lowtide.report import text
    from lowtide.workflows.recipe_files import device_of_row, run_row

    place = on_device(device_of_row(recipe, row, change) if device == AUTO else device)
    changes = [*change, f"device={place}"]
    result = run_row(recipe, row, out, changes=changes, without=without, model=model)
    show(result, as_json, text.quantized(result))


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
    widths: Annotated[
        str, typer.Option(help="Such as W4A8,W4A4; default: the papers' seven.")
    ] = "",
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


app.command(rich_help_panel=MEASURE)(verify)
app.command(rich_help_panel=USE)(export)
app.command(rich_help_panel=USE)(demo)
