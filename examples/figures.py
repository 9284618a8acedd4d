"""Draw the figures of docs/methods from zoo:digits: `python examples/figures.py`; each shows what one paper is about."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from lowtide import quantization, sampling
from lowtide.methods import METHODS, ptqd, tcaq
from lowtide.methods.mpq import OMQ, kurtosis
from lowtide.methods.ptq4dm import NDTC
from lowtide.models import adapt
from lowtide.nn.attention import QuantAttention
from lowtide.nn.precision import Precision
from lowtide.nn.swap import find_clock, quant_layers, quantizers, set_precision
from lowtide.report.palette import ACCENT, FAINT, HAIR, INK, QUIET
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Call, Job, Stage, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.distill import Distill
from lowtide.stages.fit_ranges import FitRanges, run_call, watch
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.layer_error import watched
from lowtide.stages.power_law import power_law_wins
from lowtide.stages.temporal_features import TemporalFeatures

MODEL = "zoo:digits"
RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
LAYER = "up_blocks.2.resnets.0.conv1"
SOFTMAX_BITS = (8, 6, 4, 3)
SMALL = {"steps": 20, "images": 4, "calibration_steps": 20, "iters": 100, "batch": 16}


def started(model: str = MODEL, *, per_step: bool = True, **settings) -> Job:
    pipe = sampling.load_pipeline(model)
    denoiser = sampling.denoiser(pipe).requires_grad_(False)
    job = Job(
        pipe,
        denoiser,
        adapt(denoiser, sampling.example(pipe)),
        Settings(**SMALL | settings),
        "figures",
    )
    run_recipe((Collect(), Assign(per_step=per_step)), job)
    return job


def fitted(*stages: Stage, per_step: bool = False, **settings) -> Job:
    """Everything rounded to nearest, with ranges by mse, after these stages."""
    job = started(per_step=per_step, **settings)
    run_recipe((*stages, FitWeights("mse"), FitRanges("mse")), job)
    return job


def unseen() -> list[Call]:
    """The float model's path from seeds that no calibration here begins at."""
    return started(seed=1, images=8).calls


def noise(job: Job, calls: list[Call]) -> ptqd.Moments:
    """What quantization does to the answers on these calls, by step."""
    return ptqd.measure(replace(job, calls=calls))


def sheet(columns: int, width: float = 4.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, 3.6), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(HAIR)
    return figure, axes


def title(axes: Axes, text: str, xlabel: str, ylabel: str) -> None:
    """Called once the axis' scale is set, which makes new ticks."""
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, fontsize=8.5, color=QUIET)
    axes.set_ylabel(ylabel, fontsize=8.5, color=QUIET)
    axes.tick_params(which="both", colors=QUIET, labelsize=8, length=0)


def features(model: torch.nn.Module, unit, adapter, timesteps: list[int]) -> torch.Tensor:
    """All features of a block side by side, timesteps x values."""
    rows = [{"timestep": torch.tensor(float(timestep))} for timestep in timesteps]
    clock = getattr(model, "lowtide_clock", None)
    if clock is not None:
        clock.set(torch.tensor(timesteps))
    with torch.no_grad():
        return torch.cat(TemporalFeatures(adapter, unit, rows)(model), 1)


def temporal_mismatch(path: Path) -> None:
    """Which float timestep each quantized feature looks like, and how far off it is."""
    floating = sampling.load_pipeline(MODEL).unet
    adapter = adapt(floating)
    (unit,) = adapter.temporal()
    fine = list(range(1000))
    finely = features(floating, unit, adapter, fine)
    figure, (left, right) = sheet(2)
    left.axhline(0, color=HAIR, linewidth=5, solid_capstyle="round")
    for method, colour in (("minmax", FAINT), ("tfmq", INK), ("temporal_cache", ACCENT)):
        pipe = sampling.load_pipeline(MODEL)
        quantization.quantize(pipe, method=method, weights=4, inputs=8, **SMALL)
        timesteps = pipe.unet.lowtide_clock.timesteps.tolist()
        ours, coarse = features(pipe.unet, unit, adapter, timesteps), finely[timesteps]
        nearest = torch.cdist(ours, finely).argmin(1)
        away = [int(near) - timestep for near, timestep in zip(nearest, timesteps, strict=True)]
        left.plot(
            timesteps, away, color=colour, marker="o", markersize=3, linewidth=1, label=method
        )
        right.plot(
            timesteps,
            (ours - coarse).norm(dim=1) / coarse.norm(dim=1),
            color=colour,
            linewidth=1.6,
            label=method,
        )
    right.set_yscale("log")
    title(
        left,
        "How far off the network takes the time to be",
        "timestep",
        "nearest float timestep - timestep",
    )
    title(right, "How far the features are off", "timestep", "relative L2 error")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def channel_ranges(path: Path) -> None:
    """A convolution's input peaks over channels and steps, before and after TCR."""
    job = started()
    layers = dict(quant_layers(job.model))
    peaks = watched(job, {LAYER: layers[LAYER]}, 64)[LAYER].peaks()
    r = tcaq.reparameterization(peaks, 0.05).clamp(1, 10)
    order = peaks.amax(0).argsort(descending=True)
    figure, axes = sheet(2)
    for each, values, text in ((axes[0], peaks, "Before TCR"), (axes[1], peaks / r, "After TCR")):
        image = each.imshow(
            (values[:, order] / values.max()).numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1
        )
        each.yaxis.set_major_locator(MaxNLocator(integer=True))
        share = (values.amax(1) / values.median(1).values).mean()
        title(
            each,
            f"{text}: peak is {share:.1f} x the median channel",
            "input channel, heaviest first",
            "step, noise to image",
        )
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.outline.set_visible(False)
    title(bar.ax, "", "", "share of the largest peak")
    figure.savefig(path)


def softmax_tails(path: Path) -> None:
    """Softmax outputs at one step, and along the steps how much better a power law fits each attention than an exponential."""
    job = started()
    run_recipe((FitWeights("mse"), FitRanges("minmax")), job)
    seen = watch(job, keep=True)
    set_precision(job.model, Precision.FLOAT)
    tails = {
        name: tail_ratios(seen[f"{name}.processor.softmax"].drawn()) for name in job.plan.attentions
    }
    name = max(tails, key=lambda name: max(tails[name]))
    step = int(np.argmax(tails[name]))
    values = seen[f"{name}.processor.softmax"].drawn()[step].numpy()
    figure, (left, right) = sheet(2)
    left.hist(
        values[values > 0],
        bins=np.geomspace(max(values.min(), 1e-7), values.max(), 60),
        color=ACCENT,
    )
    left.set(xscale="log", yscale="log")
    left.xaxis.set_minor_formatter(NullFormatter())
    title(left, f"{name}, step {step + 1}", "softmax output", "count")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.axhline(0, color=HAIR, linewidth=1)
    for attention, ratios in tails.items():
        right.plot(
            range(1, len(ratios) + 1),
            ratios,
            color=ACCENT if attention == name else FAINT,
            linewidth=1.6,
        )
    log2 = np.mean([ratio > 0 for ratios in tails.values() for ratio in ratios])
    title(
        right, f"log2 (R > 0) at {100 * log2:.0f} % of steps", "step, noise to image", "R per value"
    )
    figure.savefig(path)


def tail_ratios(values: list[torch.Tensor]) -> list[float]:
    return [power_law_wins(step.numpy(), ("exponential",), 0.5) for step in values]


def softmax_grids(path: Path) -> None:
    """The error of the answer when softmax outputs alone are rounded: evenly, by DAQ's law, and by the error that is left."""
    figure, both = sheet(2)
    rules = {
        "uniform, best range": INK,
        "DAQ, by the tail's law": FAINT,
        "DAQ, by the error left": ACCENT,
    }
    models = {MODEL: {}, "zoo:dit": {"labels": tuple(range(4)), "guidance": 2.0}}
    for axes, (model, asked) in zip(both, models.items(), strict=True):
        errors = zip(
            *(softmax_errors(model, inputs=bits, **asked) for bits in SOFTMAX_BITS), strict=True
        )
        for (label, colour), found in zip(rules.items(), errors, strict=True):
            axes.plot(
                range(len(found)),
                found,
                "o-",
                color=colour,
                linewidth=1.6,
                markersize=4,
                label=label,
            )
            print(
                f"{model}, {label}:",
                *(f"A{bits} {each:.4f}" for bits, each in zip(SOFTMAX_BITS, found, strict=True)),
            )
        axes.set(yscale="log", ylim=(7e-5, 7e-2))
        axes.set_yticks((1e-4, 1e-3, 1e-2), ("0.01 %", "0.1 %", "1 %"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(range(len(SOFTMAX_BITS)), SOFTMAX_BITS)
        title(
            axes,
            model,
            "bits of the softmax output, nothing else rounded",
            "relative error of the answer",
        )
    both[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


@torch.no_grad()
def softmax_errors(model: str, **settings) -> list[float]:
    """Relative L2 of one answer, mean over steps, on the path calibrated on: evenly rounded, by DAQ's law, by the error left."""
    job = started(model, **settings)
    run_recipe((FitWeights("minmax"), FitRanges("mse")), job)
    set_precision(job.model, Precision.FLOAT)
    floating = [run_call(job, call)[0] for call in job.calls]
    errors = []
    for stages in ((), (tcaq.DAQ(),), (tcaq.DAQ(by="error"),)):
        run_recipe(stages, job)
        set_precision(job.model, Precision.FLOAT)
        for attention in (
            module for module in job.model.modules() if isinstance(module, QuantAttention)
        ):
            attention.active = attention.softmax.enabled = True
        pairs = zip((run_call(job, call)[0] for call in job.calls), floating, strict=True)
        errors.append(
            float(np.mean([(ours - theirs).norm() / theirs.norm() for ours, theirs in pairs]))
        )
    return errors


def kurtosis_bits(path: Path) -> None:
    """Kurtosis of output channels against the bits OMQ deals them at W3."""
    job = started(weights=3, inputs=6)
    OMQ().run(job)
    layers = {
        name: layer
        for name, layer in quant_layers(job.model)
        if isinstance(layer.format.bits, tuple)
    }
    heavy = {
        name: kurtosis(layer.whole_weight().flatten(1).float()) for name, layer in layers.items()
    }
    name = max(
        layers,
        key=lambda name: len(set(layers[name].format.bits)) * 1000 + heavy[name].std().item(),
    )
    bits = torch.tensor(layers[name].format.bits)
    figure, axes = sheet(2)
    order = heavy[name].argsort(descending=True)
    colours = {2: FAINT, 3: INK, 4: ACCENT}
    axes[0].bar(
        range(len(order)),
        heavy[name][order].numpy(),
        color=[colours[int(bit)] for bit in bits[order]],
        width=1,
    )
    for bit, colour in colours.items():
        axes[0].bar([0], [0], color=colour, label=f"{bit} bits")
    axes[0].legend(frameon=False, fontsize=8)
    title(axes[0], name, "output channel, heaviest tail first", "kurtosis of its weights")
    counts = [sum(layer.format.bits.count(bit) for layer in layers.values()) for bit in colours]
    bars = axes[1].bar(
        [str(bit) for bit in colours], counts, color=list(colours.values()), width=0.6
    )
    axes[1].set_yscale("log")
    axes[1].bar_label(bars, fmt="{:,.0f}", fontsize=8, color=QUIET, padding=2)
    title(
        axes[1],
        f"All layers: {job.report['mpq']['average_bits']:.3f} bits on average",
        "bits",
        "channels",
    )
    figure.savefig(path)


def shortcut_halves(path: Path) -> None:
    """How far apart the two tensors that a shortcut reads are, and the weights that meet them."""
    job = started()
    joined, layers = job.adapter.concatenations(), dict(quant_layers(job.model))
    names = [name for name in job.adapter.shortcuts() if name in joined]
    seen = watched(job, {name: layers[name] for name in names}, 64)
    figure, (left, right) = sheet(2)
    inputs = [halves(seen[name].lo.amin(0), seen[name].hi.amax(0), joined[name]) for name in names]
    weights = []
    for name in names:
        rows = (
            layers[name]
            .weight.detach()
            .flatten(1)
            .split([joined[name], seen[name].lo.shape[1] - joined[name]], 1)
        )
        weights.append([(half.amin(1).mean().item(), half.amax(1).mean().item()) for half in rows])
    for axes, ends, what in ((left, inputs, "Input"), (right, weights, "Weight")):
        for half, colour, label in (
            (0, FAINT, "from the layer before"),
            (1, ACCENT, "from the down blocks"),
        ):
            places = np.arange(len(names)) + 0.36 * half - 0.18
            lo, hi = np.array([pair[half] for pair in ends]).T
            axes.bar(places, hi - lo, 0.32, bottom=lo, color=colour, label=label)
        axes.use_sticky_edges = False
        axes.axhline(0, color=HAIR, linewidth=1)
        axes.set_xticks(
            range(len(names)),
            [".".join(part for part in name.split(".") if part.isdigit()) for name in names],
        )
        widths = np.diff(ends)[..., 0]
        ratio = np.exp(np.log(widths[:, 1] / widths[:, 0]).mean())
        title(
            axes,
            f"{what}: second half {ratio:.1f} x as wide",
            "up block . resnet",
            f"{what.lower()}, least to greatest",
        )
    right.set_ylabel("weight, mean ends of output channels", fontsize=8.5, color=QUIET)
    left.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(path)


def halves(lo: torch.Tensor, hi: torch.Tensor, width: int) -> list[tuple[float, float]]:
    """The ends of the first `width` channels and of the rest."""
    return [
        (lo[part].min().item(), hi[part].max().item())
        for part in (slice(width), slice(width, None))
    ]


def drawn_timesteps(path: Path) -> None:
    """Which timesteps NDTC draws, and what ranges fitted on them are worth at each step."""
    calls, options = unseen(), {"weights": 8, "inputs": 4, "images": 8, "calibration_steps": 40}
    drawn, spread = fitted(NDTC(), **options), fitted(**options)
    timesteps, count = sorted(find_clock(drawn.model).known), len(drawn.calls)
    chances = (
        NDTC()
        .draw(100_000, len(timesteps), torch.Generator().manual_seed(0))
        .bincount(minlength=len(timesteps))
        / 1e5
    )
    figure, (left, right) = sheet(2)
    shares = [drawn.report["ndtc"].get(timestep, 0) / count for timestep in timesteps]
    left.bar(timesteps, shares, 36, color=ACCENT, label=f"{count} draws")
    left.plot(
        timesteps,
        chances,
        color=INK,
        marker="o",
        markersize=3,
        linewidth=1,
        label="expected of NDTC",
    )
    left.axhline(1 / len(timesteps), color=FAINT, linewidth=1.6, label="evenly spread")
    left.yaxis.set_major_formatter(PercentFormatter(1, 0))
    title(
        left,
        f"{100 * (shares[0] + shares[-1]):.0f} % of the draws are first or last step",
        "timestep",
        "share of calibration",
    )
    for job, colour, label in ((spread, FAINT, "evenly spread"), (drawn, ACCENT, "NDTC")):
        found = noise(job, calls)
        label = f"{label}: {found.error():.3f} over all steps"
        right.plot(
            list(find_clock(job.model).known),
            found.snr().rsqrt(),
            color=colour,
            linewidth=1.6,
            label=label,
        )
    right.set_yscale("log")
    title(right, "Error of the answer at W8A4, unseen images", "timestep", "relative L2 error")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=8, loc="upper center" if axes is left else "upper left")
    figure.savefig(path)
    moved = (
        (find_clock(drawn.model).scale[:, 0] / find_clock(spread.model).scale[:, 0]).log2().abs()
    )
    median, most = (100 * (2 ** moved.quantile(share).item() - 1) for share in (0.5, 0.9))
    print(
        f"NDTC moves the range of half the inputs by less than {median:.1f} %, of nine in ten by less than {most:.0f} %"
    )


def quantization_noise(path: Path) -> None:
    """The error against the answer it belongs to at one step, and how much of it is left at each step after PTQD."""
    calls, job = unseen(), fitted(images=8)
    known, before = find_clock(job.model).known, noise(job, calls)
    timestep, step = next(iter(known.items()))
    (call,) = [call for call in calls if call.timestep == timestep]
    eps = ptqd.answer(job, call, False).flatten()
    error = ptqd.answer(job, call, True).flatten() - eps
    run_recipe((ptqd.CNC(), ptqd.Bias()), job)
    after, slope = noise(job, calls), ptqd.attached(job).slope[step].item()
    figure, (left, right) = sheet(2)
    # A bin with a single value has to be seen, so the grey scale begins below it.
    left.hexbin(eps, error, gridsize=45, norm=LogNorm(0.1), mincnt=1, cmap="Greys", linewidths=0)
    ends = torch.stack([eps.min(), eps.max()])
    left.plot(
        ends,
        slope * ends + (error.mean() - slope * eps.mean()),
        color=ACCENT,
        linewidth=1.6,
        label=f"slope {slope:.4f}",
    )
    title(
        left,
        f"Timestep {timestep}: error against answer",
        "float answer eps",
        "quantized - float answer, D",
    )
    for found, colour, label in (
        (before, FAINT, "as rounded"),
        (after, ACCENT, "after CNC and bias"),
    ):
        right.plot(list(known), spread_of(found), color=colour, linewidth=1.6, label=label)
    right.set_yscale("log")
    taken = 1 - (spread_of(after) / spread_of(before)).median()
    title(
        right,
        f"PTQD takes off {100 * taken:.0f} % at the median step",
        "timestep",
        "root mean square of D",
    )
    right.invert_xaxis()
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)


def spread_of(found: ptqd.Moments) -> torch.Tensor:
    """Root mean square of D at each step."""
    return found.noise_noise.mean(1).sqrt()


def learnt_scales(path: Path) -> None:
    """By how much distillation moves the input scales at each step, and what it does to the error."""
    calls, job = unseen(), fitted(per_step=True, weights=4, inputs=4, images=8)
    clock = find_clock(job.model)
    timesteps, scales, before = list(clock.known), clock.scale.clone(), noise(job, calls)
    run_recipe((Distill(),), job)
    after, moved = noise(job, calls), clock.scale / scales
    most = max(quantizers(job.model).items(), key=lambda item: moved[item[1].row].log().std())
    figure, (left, right) = sheet(2)
    left.plot(timesteps, moved.T, color=HAIR, linewidth=0.8)
    left.plot(timesteps, moved[most[1].row], color=ACCENT, linewidth=1.6, label=most[0])
    left.set_ylim(top=1.12 * moved.max().item())
    title(left, "Each input's scale at each step", "timestep", "scale after / before distillation")
    for found, colour, label in ((before, FAINT, "before"), (after, ACCENT, "after")):
        label = f"{label}: {found.error():.3f} over all steps"
        right.plot(timesteps, found.snr().rsqrt(), color=colour, linewidth=1.6, label=label)
    right.set_yscale("log")
    title(
        right,
        f"Error at W4A4, {job.settings.iters} iterations",
        "timestep",
        "relative L2 error, unseen images",
    )
    for axes in (left, right):
        axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)


def every_method(path: Path) -> None:
    """PSNR and step error of each method at each width, as docs/results.md has them; `best` marked."""
    cells = [
        line.split("|")[1:-1]
        for line in section(RESULTS.read_text(), MODEL)
        if line.startswith("| W")
    ]
    found = {
        (bits.strip(), name.strip()): (mean(psnr), mean(step))
        for bits, name, _, psnr, _, step, *_ in cells
    }
    widths, names = (
        list(dict.fromkeys(key[place] for key in found if key[1] in METHODS)) for place in (0, 1)
    )
    figure, axes = sheet(2, 4.9)
    for column, (each, words) in enumerate(
        zip(axes, ("PSNR to the float model's samples, dB", "error of single answers"), strict=True)
    ):
        for name in sorted(names, key="best".__eq__):
            points = [
                (place, found[width, name][column])
                for place, width in enumerate(widths)
                if (width, name) in found
            ]
            colour = INK if name == "minmax" else ACCENT if name == "best" else FAINT
            each.plot(
                *zip(*points, strict=True),
                "o",
                color=colour,
                markersize=7 if name == "best" else 5,
                label=name,
            )
        each.set_xticks(range(len(widths)), widths)
        title(each, words, "", "")
    axes[1].set_yscale("log")
    axes[1].set_yticks((0.01, 0.02, 0.05, 0.1, 0.2), ("1 %", "2 %", "5 %", "10 %", "20 %"))
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    marks = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    shown = {"best": "best", "minmax": "minmax", "tfmq": "the eight papers' methods"}
    axes[0].legend([marks[name] for name in shown], shown.values(), frameon=False, fontsize=8)
    figure.savefig(path)


def section(page: str, model: str) -> list[str]:
    return page.partition(f"## {model}\n")[2].partition("\n## ")[0].splitlines()


def mean(text: str) -> float:
    """'36.15 ± 0.67' -> 36.15."""
    return float(text.split("±")[0])


DRAWN = (
    temporal_mismatch,
    channel_ranges,
    softmax_tails,
    softmax_grids,
    kurtosis_bits,
    shortcut_halves,
)
DRAWN += (drawn_timesteps, quantization_noise, learnt_scales, every_method)
FIGURES = {draw.__name__.replace("_", "-"): draw for draw in DRAWN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], help="which ones; all if none is named")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names or FIGURES:
        FIGURES[name](given.out / f"{name}.png")
        print(given.out / f"{name}.png")


if __name__ == "__main__":
    main()
