"""The command line: each command is one call into run.py. Progress goes to stderr, results to stdout."""

import errno
import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from lowtide import __version__
from lowtide.errors import BadInput

MOST_NUMBERS = 100_000

app = typer.Typer(
    help="Quantize diffusion models and keep their sense of time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

bench = typer.Typer(help="Measure methods against each other.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Argument(help="A hub id, a local diffusers folder, or zoo:NAME.")]
Out = Annotated[Path, typer.Option("--out", help="Where the result goes.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Labels = Annotated[str, typer.Option(help="Classes to draw, such as 0-9 or 1,5.")]
Prompts = Annotated[Path | None, typer.Option(help="A file with one prompt a line; without it, a built-in list.")]
Steps = Annotated[int, typer.Option(help="Sampling steps; a packed model knows the steps it was calibrated for.")]
Without = Annotated[list[str], typer.Option(help="A stage to leave out, such as tiar; give it once for each.")]
Change = Annotated[
    list[str], typer.Option("--set", help="Change a setting, iters=500, or a stage's option, omq.plus=true; once for each.")
]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own if not given.")]
Eta = Annotated[float | None, typer.Option(help="Noise that DDIM adds, 0 to 1; the pipeline's own, 0, if not given.")]
Method = Annotated[str, typer.Option(help="See `lowtide methods`.")]
Weights = Annotated[int, typer.Option("-w", "--weights", help="Bits per weight: 1 to 8, 16 or 32 for float.")]
Inputs = Annotated[int, typer.Option("-a", "--inputs", help="Bits per input: 1 to 8, 16 or 32 for float.")]
Profile = Annotated[str, typer.Option(help="full: every layer; paper: what the papers' released code quantizes.")]
Group = Annotated[int | None, typer.Option(help="Weights that share a scale factor, such as 64.")]
Images = Annotated[int, typer.Option(help="Calibration images.")]
Kept = Annotated[int, typer.Option(help="Timesteps whose inputs serve reconstruction, evenly spread.")]
Iters = Annotated[int, typer.Option(help="Rounding iterations per block; the papers use 20000.")]
Scope = Annotated[str, typer.Option(help="What is rounded together: block (BRECQ) or layer (AdaRound).")]
Drop = Annotated[
    float | None, typer.Option(help="Chance that an input is not rounded while a block learns, such as 0.5 (QDrop).")
]
RangeIters = Annotated[int, typer.Option(help="Iterations that learn the input ranges of each block; 0: none.")]
Memory = Annotated[int, typer.Option(help="MiB of calibration data to hold in memory; the rest goes to disk.")]
EarlyStop = Annotated[bool, typer.Option("--early-stop", help="Stop a block when its loss is flat and decided.")]
KeepTemporal = Annotated[bool, typer.Option("--keep-temporal", help="Keep the temporal block in float beside its cache.")]
Seed = Annotated[int, typer.Option(help="What calibration and learning draw from; the same seed, the same codes.")]
Seeds = Annotated[str, typer.Option(help="One image per seed, such as 0-63.")]
Metrics = Annotated[
    str,
    typer.Option(help="Such as psnr,ssim,lpips,latent_mse,clip; with --dataset also fd,fid,sfid,kid,precision,recall."),
]
Dataset = Annotated[
    Path | None, typer.Option(help="What good images look like: a folder of them, or statistics in an .npz file.")
]
Fit = Annotated[str | None, typer.Option(help="The most bits per weight, of 8,6,4,3,2, within this size, such as 4GiB.")]
MinPsnr = Annotated[float | None, typer.Option(help="Gate: the least PSNR to the reference, in dB.")]
MaxLpips = Annotated[float | None, typer.Option(help="Gate: the largest LPIPS to the reference.")]
MaxFdIncrease = Annotated[float | None, typer.Option(help="Gate: how much farther from --dataset than the reference.")]


def _print_version(requested: bool) -> None:
    if requested:
        print(f"lowtide {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """The options that stand before a command."""


def late(module: str) -> Any:
    """A module of lowtide, imported now: torch and diffusers take seconds, and --help must not wait for them."""
    return import_module(f"lowtide.{module}")


def numbers(text: str) -> tuple[int, ...]:
    """'0-3,8' -> 0, 1, 2, 3, 8."""
    found: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part, re.ASCII)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not 0 < len(span) <= MOST_NUMBERS:
            raise BadInput(f"found {part!r}", f"numbers and ranges such as 0-9,12, at most {MOST_NUMBERS} long", "mend it")
        found += span
    return tuple(found)


def prompts_of(path: Path | None) -> tuple[str, ...]:
    return late("sample").read_prompts(path) if path else ()


def options(
    weights: Weights = 4,
    inputs: Inputs = 8,
    steps: Steps = 50,
    profile: Profile = "full",
    group: Group = None,
    images: Images = 32,
    kept: Kept = 25,
    iters: Iters = 1000,
    scope: Scope = "block",
    drop: Drop = None,
    range_iters: RangeIters = 0,
    memory: Memory = 128,
    prompts: Prompts = None,
    labels: Labels = "",
    guidance: Guidance = None,
    eta: Eta = None,
    seed: Seed = 0,
    early_stop: EarlyStop = False,
    keep_temporal: KeepTemporal = False,
    without: Without = [],  # noqa: B006
    change: Change = [],  # noqa: B006
) -> None:
    """How to quantize: what `quantize` does and `plan` foretells."""


def takes_options(command: Callable) -> Callable:
    """Give a command the `options` in the place of its `**asked`, before the last of its own."""
    *first, last, _ = signature(command).parameters.values()
    command.__signature__ = Signature([*first, *signature(options).parameters.values(), last])
    return command


def settings(asked: dict[str, Any]) -> dict[str, Any]:
    """The options as Python has them."""
    asked, changes = {name: value for name, value in asked.items() if name != "change"}, asked["change"]
    lists = {"prompts": prompts_of(asked["prompts"]), "labels": numbers(asked["labels"]), "without": tuple(asked["without"])}
    return late("recipe").changed(asked | lists | {"memory": asked["memory"] << 20}, changes)


def show(result: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    print(json.dumps(result) if as_json else "\n".join(lines))


@app.command()
@takes_options
def quantize(model: Model, out: Out, method: Method = "best", as_json: Json = False, **asked: Any) -> None:
    """Quantize a model and save it as a diffusers folder."""
    result = late("run").quantize_to_folder(model, out, method, settings(asked))
    show(result, as_json, late("report.text").quantized(result))


@app.command()
@takes_options
def plan(model: Model, fit: Fit = None, method: Method = "best", as_json: Json = False, **asked: Any) -> None:
    """Say what quantize would take: size, memory and time by stage, from the model's configuration alone."""
    result = late("estimate").predict(model, method=method, fit=fit, **settings(asked))
    show(result, as_json, late("report.text").estimated(result))


@app.command()
def reschedule(
    model: Annotated[Path, typer.Argument(help="A folder that lowtide quantize wrote, with --keep-temporal if it has a cache.")],
    out: Out,
    steps: Annotated[int, typer.Option("--steps", help="Sampling steps of the new schedule.")],
    as_json: Json = False,
) -> None:
    """Make a packed model fit another number of steps, without quantizing again."""
    result = late("schedule").reschedule_to_folder(model, out, steps)
    show(result, as_json, late("report.text").rescheduled(result))


@app.command()
def sample(
    model: Model,
    out: Out,
    seeds: Annotated[str, typer.Option(help="One image per seed, such as 0-63.")] = "0-15",
    steps: Steps = 50,
    batch: int = 16,
    prompts: Prompts = None,
    labels: Labels = "",
    guidance: Guidance = None,
    eta: Eta = None,
    as_json: Json = False,
) -> None:
    """Draw images from a float or packed model, one PNG per seed and a grid."""
    text = late("report.text")
    asked = {"prompts": prompts_of(prompts), "labels": numbers(labels), "guidance": guidance, "eta": eta}
    request = late("sample").Request(steps=steps, seeds=numbers(seeds), batch=batch, **asked)
    result = late("run").sample_to_folder(model, out, request, text.track)
    show(result, as_json, [f"{result['images']} images in {out}, {result['seconds_per_step']} s a step"])


def verdict(found: dict[str, Any], as_json: bool) -> None:
    """Print what was found; a gate that was not kept is a line on stderr and exit code 1."""
    drawn = late("report.verdict")
    show(found, as_json, drawn.lines(found))
    for line in drawn.failures(found):
        print(line, file=sys.stderr)
    if drawn.failures(found):
        raise typer.Exit(1)


def evidence_asked(**options: Any) -> dict[str, Any]:
    """The options of evaluate and compare as Python has them."""
    gates = {name: options.pop(name.replace("-", "_")) for name in ("min-psnr", "max-lpips", "max-fd-increase")}
    options["metrics"] = [name.strip() for name in options["metrics"].split(",") if name.strip()] or None
    options |= {
        "seeds": numbers(options["seeds"]),
        "labels": numbers(options["labels"]),
        "prompts": prompts_of(options["prompts"]),
    }
    return options | {"gates": {name: limit for name, limit in gates.items() if limit is not None}}


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A folder that lowtide quantize wrote.")],
    reference: Annotated[str | None, typer.Option(help="The float model, if the folder does not say which it was.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the evidence goes; RUN/evidence if not given.")] = None,
    seeds: Seeds = "0-63",
    steps: Annotated[int | None, typer.Option(help="Sampling steps; those of the calibration if not given.")] = None,
    batch: int = 16,
    prompts: Prompts = None,
    labels: Labels = "",
    guidance: Guidance = None,
    eta: Eta = None,
    metrics: Metrics = "",
    dataset: Dataset = None,
    min_psnr: MinPsnr = None,
    max_lpips: MaxLpips = None,
    max_fd_increase: MaxFdIncrease = None,
    as_json: Json = False,
) -> None:
    """Measure a quantized model against the float model: same seeds, metrics, errors by layer and step, report.html."""
    asked = {"seeds": seeds, "steps": steps, "batch": batch, "prompts": prompts, "labels": labels, "guidance": guidance}
    asked |= {"eta": eta, "min_psnr": min_psnr, "max_lpips": max_lpips, "max_fd_increase": max_fd_increase}
    asked = evidence_asked(**asked, metrics=metrics, dataset=dataset)
    verdict(late("evidence").evaluate(run, reference=reference, out=out, **asked), as_json)


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Any mix of float models, lowtide's and other checkpoints.")],
    reference: Annotated[str | None, typer.Option(help="What all are compared with; the first float model if not given.")] = None,
    out: Out = Path("evidence"),
    seeds: Seeds = "0-63",
    steps: Annotated[int | None, typer.Option(help="Sampling steps; those of a calibration if not given.")] = None,
    batch: int = 16,
    prompts: Prompts = None,
    labels: Labels = "",
    guidance: Guidance = None,
    eta: Eta = None,
    metrics: Metrics = "",
    dataset: Dataset = None,
    min_psnr: MinPsnr = None,
    max_lpips: MaxLpips = None,
    max_fd_increase: MaxFdIncrease = None,
    as_json: Json = False,
) -> None:
    """Measure any models side by side, with the same evidence and gates as evaluate."""
    asked = {"seeds": seeds, "steps": steps, "batch": batch, "prompts": prompts, "labels": labels, "guidance": guidance}
    asked |= {"eta": eta, "min_psnr": min_psnr, "max_lpips": max_lpips, "max_fd_increase": max_fd_increase}
    asked = evidence_asked(**asked, metrics=metrics, dataset=dataset)
    verdict(late("evidence").compare(*models, reference=reference, out=out, **asked), as_json)


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Show units, the temporal block, layers, bits and bytes."""
    result = late("run").inspect(model)
    show(result, as_json, late("report.text").inspected(result))


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods and the papers behind them."""
    found = late("run").methods()
    show({"methods": found}, as_json, [f"{one['name']:<10} {one['what']}" for one in found])


@app.command("run")
def run_recipe(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, such as recipes/sd14-w4a8-tfmq.toml.")],
    out: Out,
    change: Change = [],  # noqa: B006
    without: Without = [],  # noqa: B006
    model: Annotated[str | None, typer.Option(help="Another model than the recipe names.")] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe: a model, a method and settings, written down."""
    result = late("recipe").cook(recipe, out, changes=change, without=without, model=model)
    show(result, as_json, late("report.text").quantized(result))


@bench.command("quality")
def bench_quality(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="Where finished cells are kept; run again to go on.")] = Path("runs/quality"),
    methods: Annotated[str, typer.Option(help="Methods with commas between; tcaq-par leaves PAR out. Default: all.")] = "",
    widths: Annotated[str, typer.Option(help="Such as W4A8,W4A4; default: the papers' seven.")] = "",
    seeds: Annotated[str, typer.Option(help="Calibration seeds, such as 0-2.")] = "0",
    samples: Annotated[int, typer.Option(help="Images that are compared with the float model's.")] = 64,
    change: Change = [],  # noqa: B006
    markdown: Annotated[Path | None, typer.Option(help="Write all kept cells of this model to its section of this file.")] = None,
    as_json: Json = False,
) -> None:
    """Every method at every width on one model: PSNR to float, errors, size, minutes."""
    quality = late("quality")
    cells = quality.grid(methods, widths, numbers(seeds))
    found = quality.quality(model, out, cells, late("recipe").changed({}, change), samples)
    if markdown:
        before = markdown.read_text() if markdown.exists() else ""
        markdown.write_text(quality.page(quality.kept(out, found[0]), before))
    show({"cells": found}, as_json, late("report.text").table(quality.HEAD, quality.rows(found)))


@app.command()
def demo(out: Out = Path("demo"), iters: int = 120, as_json: Json = False) -> None:
    """Quantize the zoo's digits and emoji with minmax, tfmq and best, and draw what was lost."""
    result = late("demo").demo(out, iters=iters)
    show(result, as_json, late("report.text").demonstrated(result))


def fail(message: str) -> int:
    print(f"error: {message}.", file=sys.stderr)
    return 2


def disk_is_full(error: Exception) -> bool:
    """Also as safetensors says it, whose errors are no OSError."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def main() -> None:
    """Run; what the user can mend is one sentence and exit code 2."""
    try:
        app(standalone_mode=True)
    except BadInput as error:
        sys.exit(fail(str(error)))
    except Exception as error:
        if not disk_is_full(error):
            raise
        sys.exit(fail("found the disk full; expected room for the result; free some space, nothing was changed"))
