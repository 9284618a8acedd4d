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
from lowtide.cli.benching import bench
from lowtide.cli.demonstrating import demo
from lowtide.cli.exporting_runs import export
from lowtide.cli.options import (
    MODEL,
    OUTPUT,
    Change,
    Device,
    Json,
    MaxDisk,
    MaxMemory,
    Model,
    Out,
    Sampler,
    Spacing,
    limit,
    options_of,
    show,
    values,
)
from lowtide.cli.places import check_one_process, on_device
from lowtide.cli.recalibrating import recalibrate
from lowtide.cli.serving import serve
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
app.add_typer(bench, name="bench", rich_help_panel="Develop")

MAKE = "Quantize"
USE = "Use"
MEASURE = "Measure"
DEVELOP = "Develop"

Method = Annotated[MethodName, typer.Option(help="See `lowtide methods`.", rich_help_panel=MODEL)]
Without = Annotated[
    list[str],
    typer.Option(
        help="A stage to leave out, such as tiar; give it once for each.", rich_help_panel=MODEL
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
    max_memory: MaxMemory = None,
    max_disk: MaxDisk = None,
    as_json: Json = False,
    **options: object,
) -> None:
    """Quantize a model and save it as a diffusers folder."""
    from lowtide.report import text
    from lowtide.workflows.to_folder import Limits, quantize_to_folder

    settings = changed(values(options), change)
    settings["device"] = on_device(settings["device"])
    settings["without"] = tuple(without)
    limits = Limits(*map(limit, (max_memory, max_disk)))
    result = quantize_to_folder(model, out, method, settings, fuse_lora, limits)
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
    from lowtide.workflows.sampled_folder import sample_to_folder

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


app.command(rich_help_panel=MEASURE)(verify)
app.command(rich_help_panel=USE)(serve)
app.command(rich_help_panel=USE)(export)
app.command(rich_help_panel=USE)(demo)
