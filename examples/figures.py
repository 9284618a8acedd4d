"""Draw the figures of docs/methods, one for each paper's idea: `python examples/figures.py`."""

import argparse
from pathlib import Path

import numpy as np
import torch
from drawing import MODEL, SMALL, sheet, started, title
from error_figures import drawn_timesteps, learnt_scales, quantization_noise
from matplotlib.ticker import MaxNLocator, NullFormatter
from time_figures import temporal_damage, temporal_damage_of_cifar10

from lowtide import quantization, sampling
from lowtide.methods import METHODS, relevant_options, tcaq
from lowtide.methods.mpq import OMQ, kurtosis
from lowtide.models import adapt
from lowtide.nn.attention import QuantAttention
from lowtide.nn.precision import Precision
from lowtide.nn.swap import quant_layers, set_precision
from lowtide.report.palette import ACCENT, FAINT, HAIR, INK, QUIET
from lowtide.stages.base import run_recipe
from lowtide.stages.fit_ranges import FitRanges, input_statistics, run_call
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.layer_error import layer_inputs
from lowtide.stages.power_law import power_law_wins
from lowtide.stages.temporal_features import TemporalFeatures

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
LAYER = "up_blocks.2.resnets.0.conv1"
SOFTMAX_BITS = (8, 6, 4, 3)


def features(model: torch.nn.Module, unit, adapter, timesteps: list[int]) -> torch.Tensor:
    """All features of a block side by side: (timesteps, values)."""
    rows = [{"timestep": torch.tensor(float(timestep))} for timestep in timesteps]
    clock = getattr(model, "lowtide_clock", None)
    if clock is not None:
        clock.set(torch.tensor(timesteps))
    with torch.no_grad():
        return torch.cat(TemporalFeatures(adapter, unit, rows)(model), 1)


def temporal_mismatch(path: Path) -> None:
    """Which float timestep each quantized feature is nearest to, and its error."""
    floating = sampling.load_pipeline(MODEL).unet
    adapter = adapt(floating)
    (unit,) = adapter.temporal()
    fine = list(range(1000))
    finely = features(floating, unit, adapter, fine)
    figure, (left, right) = sheet(2)
    left.axhline(0, color=HAIR, linewidth=5, solid_capstyle="round")
    for method, colour in (("minmax", FAINT), ("tfmq", INK), ("temporal_cache", ACCENT)):
        pipe = sampling.load_pipeline(MODEL)
        quantization.quantize(pipe, method=method, **relevant_options(method, SMALL))
        timesteps = pipe.unet.lowtide_clock.timesteps.tolist()
        ours = features(pipe.unet, unit, adapter, timesteps)
        coarse = finely[timesteps]
        error = (ours - coarse).norm(dim=1) / coarse.norm(dim=1)
        nearest = torch.cdist(ours, finely).argmin(1)
        away = [int(near) - timestep for near, timestep in zip(nearest, timesteps, strict=True)]
        dots = {"marker": "o", "markersize": 3, "linewidth": 1}
        left.plot(timesteps, away, color=colour, label=method, **dots)
        right.plot(timesteps, error, color=colour, linewidth=1.6, label=method)
    right.set_yscale("log")
    off = "nearest float timestep - timestep"
    title(left, "How far off the network takes the time to be", "timestep", off)
    title(right, "How far the features are off", "timestep", "relative L2 error")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def channel_ranges(path: Path) -> None:
    """The largest input of a convolution by channel and step, before and after TCR."""
    job = started()
    layers = dict(quant_layers(job.model))
    peaks = layer_inputs(job, {LAYER: layers[LAYER]}, 64)[LAYER].peaks()
    r = tcaq.reparameterization(peaks, 0.05).clamp(1, 10)
    order = peaks.amax(0).argsort(descending=True)
    figure, axes = sheet(2)
    for each, values, text in ((axes[0], peaks, "Before TCR"), (axes[1], peaks / r, "After TCR")):
        shares = (values[:, order] / values.max()).numpy()
        image = each.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        each.yaxis.set_major_locator(MaxNLocator(integer=True))
        ratio = (values.amax(1) / values.median(1).values).mean()
        text = f"{text}: peak is {ratio:.1f} x the median channel"
        title(each, text, "input channel, heaviest first", "step, noise to image")
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.outline.set_visible(False)
    title(bar.ax, "", "", "share of the largest peak")
    figure.savefig(path)


def softmax_tails(path: Path) -> None:
    """Softmax outputs at one step, and how much better a power law fits than an exponential.

    The right half shows the fit of every attention at every step.
    """
    job = started()
    run_recipe((FitWeights("mse"), FitRanges("minmax")), job)
    watched_inputs = input_statistics(job, keep=True)
    set_precision(job.model, Precision.FLOAT)
    softmax = {
        name: watched_inputs[f"{name}.processor.softmax"].drawn() for name in job.plan.attentions
    }
    tails = {name: tail_ratios(values) for name, values in softmax.items()}
    name = max(tails, key=lambda name: max(tails[name]))
    step = int(np.argmax(tails[name]))
    values = softmax[name][step].numpy()
    figure, (left, right) = sheet(2)
    bins = np.geomspace(max(values.min(), 1e-7), values.max(), 60)
    left.hist(values[values > 0], bins=bins, color=ACCENT)
    left.set(xscale="log", yscale="log")
    left.xaxis.set_minor_formatter(NullFormatter())
    title(left, f"{name}, step {step + 1}", "softmax output", "count")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.axhline(0, color=HAIR, linewidth=1)
    for attention, ratios in tails.items():
        colour = ACCENT if attention == name else FAINT
        right.plot(range(1, len(ratios) + 1), ratios, color=colour, linewidth=1.6)
    log2 = np.mean(np.concatenate(list(tails.values())) > 0)
    text = f"log2 (R > 0) at {100 * log2:.0f} % of steps"
    title(right, text, "step, noise to image", "R per value")
    figure.savefig(path)


def tail_ratios(values: list[torch.Tensor]) -> list[float]:
    return [power_law_wins(step.numpy(), ("exponential",), 0.5) for step in values]


def softmax_grids(path: Path) -> None:
    """The error of the prediction when softmax outputs alone are rounded.

    They are rounded evenly, by DAQ's test of the tail, and by the remaining error.
    """
    figure, both = sheet(2)
    rules = {
        "uniform, best range": INK,
        "DAQ, by the tail's law": FAINT,
        "DAQ, by the error left": ACCENT,
    }
    models = {MODEL: {}, "zoo:dit": {"labels": tuple(range(4)), "guidance": 2.0}}
    for axes, (model, conditions) in zip(both, models.items(), strict=True):
        by_bits = [softmax_errors(model, inputs=bits, **conditions) for bits in SOFTMAX_BITS]
        by_rule = zip(*by_bits, strict=True)
        for (label, colour), errors in zip(rules.items(), by_rule, strict=True):
            places = range(len(errors))
            style = {"color": colour, "linewidth": 1.6, "markersize": 4}
            axes.plot(places, errors, "o-", label=label, **style)
            pairs = zip(SOFTMAX_BITS, errors, strict=True)
            print(f"{model}, {label}:", *(f"A{bits} {error:.4f}" for bits, error in pairs))
        axes.set(yscale="log", ylim=(7e-5, 7e-2))
        axes.set_yticks((1e-4, 1e-3, 1e-2), ("0.01 %", "0.1 %", "1 %"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(range(len(SOFTMAX_BITS)), SOFTMAX_BITS)
        bits = "bits of the softmax output, nothing else rounded"
        title(axes, model, bits, "relative error of the answer")
    both[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


@torch.no_grad()
def softmax_errors(model: str, **settings) -> list[float]:
    """Relative L2 of one prediction on the calibration set, mean over steps.

    Three numbers: rounded evenly, by DAQ's test of the tail, by the remaining error.
    """
    job = started(model, **settings)
    run_recipe((FitWeights("minmax"), FitRanges("mse")), job)
    set_precision(job.model, Precision.FLOAT)
    floating = [run_call(job, call)[0] for call in job.calls]
    errors = []
    for stages in ((), (tcaq.DAQ(),), (tcaq.DAQ(by="error"),)):
        run_recipe(stages, job)
        set_precision(job.model, Precision.FLOAT)
        for module in job.model.modules():
            if isinstance(module, QuantAttention):
                module.active = True
                module.softmax.enabled = True
        rounded = (run_call(job, call)[0] for call in job.calls)
        pairs = zip(rounded, floating, strict=True)
        relative = [(ours - theirs).norm() / theirs.norm() for ours, theirs in pairs]
        errors.append(float(np.mean(relative)))
    return errors


def kurtosis_bits(path: Path) -> None:
    """Kurtosis of output channels against the bits that OMQ gives them at W3."""
    job = started(weights=3, inputs=6)
    OMQ().run(job)
    layers = {
        name: layer
        for name, layer in quant_layers(job.model)
        if isinstance(layer.format.bits, tuple)
    }
    heavy = {
        name: kurtosis(layer.smoothed_weight().flatten(1).float()) for name, layer in layers.items()
    }

    def rank(name: str) -> tuple[int, float]:
        return len(set(layers[name].format.bits)), heavy[name].std().item()

    name = max(layers, key=rank)
    bits = torch.tensor(layers[name].format.bits)
    figure, axes = sheet(2)
    order = heavy[name].argsort(descending=True)
    colours = {2: FAINT, 3: INK, 4: ACCENT}
    of_channels = [colours[int(bit)] for bit in bits[order]]
    axes[0].bar(range(len(order)), heavy[name][order].numpy(), color=of_channels, width=1)
    for bit, colour in colours.items():
        axes[0].bar([0], [0], color=colour, label=f"{bit} bits")
    axes[0].legend(frameon=False, fontsize=8)
    title(axes[0], name, "output channel, heaviest tail first", "kurtosis of its weights")
    counts = [sum(layer.format.bits.count(bit) for layer in layers.values()) for bit in colours]
    names = [str(bit) for bit in colours]
    bars = axes[1].bar(names, counts, color=list(colours.values()), width=0.6)
    axes[1].set_yscale("log")
    axes[1].bar_label(bars, fmt="{:,.0f}", fontsize=8, color=QUIET, padding=2)
    average = job.report["mpq"]["average_bits"]
    title(axes[1], f"All layers: {average:.3f} bits on average", "bits", "channels")
    figure.savefig(path)


def shortcut_halves(path: Path) -> None:
    """The ranges of the two tensors that a shortcut reads, and of the weights for each."""
    job = started()
    joined = job.adapter.concatenations()
    layers = dict(quant_layers(job.model))
    names = [name for name in job.adapter.shortcuts() if name in joined]
    ranges = layer_inputs(job, {name: layers[name] for name in names}, 64)
    figure, (left, right) = sheet(2)
    inputs = []
    weights = []
    for name in names:
        lo = ranges[name].lo
        inputs.append(halves(lo.amin(0), ranges[name].hi.amax(0), joined[name]))
        # Each (output channels, weights of one half of the input channels).
        weight = layers[name].weight.detach().flatten(1)
        both = weight.split([joined[name], lo.shape[1] - joined[name]], 1)
        weights.append([(half.amin(1).mean().item(), half.amax(1).mean().item()) for half in both])
    for axes, ends, what in ((left, inputs, "Input"), (right, weights, "Weight")):
        sides = ((0, FAINT, "from the layer before"), (1, ACCENT, "from the down blocks"))
        for half, colour, label in sides:
            places = np.arange(len(names)) + 0.36 * half - 0.18
            lo, hi = np.array([pair[half] for pair in ends]).T
            axes.bar(places, hi - lo, 0.32, bottom=lo, color=colour, label=label)
        axes.use_sticky_edges = False
        axes.axhline(0, color=HAIR, linewidth=1)
        axes.set_xticks(range(len(names)), [numbers_in(name) for name in names])
        widths = np.diff(ends)[..., 0]
        ratio = np.exp(np.log(widths[:, 1] / widths[:, 0]).mean())
        text = f"{what}: second half {ratio:.1f} x as wide"
        title(axes, text, "up block . resnet", f"{what.lower()}, least to greatest")
    right.set_ylabel("weight, mean ends of output channels", fontsize=8.5, color=QUIET)
    left.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(path)


def numbers_in(name: str) -> str:
    """up_blocks.0.resnets.1.conv1 -> 0.1"""
    return ".".join(part for part in name.split(".") if part.isdigit())


def halves(lo: torch.Tensor, hi: torch.Tensor, width: int) -> list[tuple[float, float]]:
    """The ends of the first `width` channels and of the rest."""
    parts = (slice(width), slice(width, None))
    return [(lo[part].min().item(), hi[part].max().item()) for part in parts]


def every_method(path: Path) -> None:
    """PSNR and step error of each method at each width, from docs/results.md; `best` is marked."""
    figures = method_figures()
    keys = [key for key in figures if key[1] in METHODS]
    widths = list(dict.fromkeys(width for width, _ in keys))
    names = list(dict.fromkeys(name for _, name in keys))
    colours = {"minmax": INK, "best": ACCENT}
    titles = ("PSNR to the float model's samples, dB", "error of single answers")
    figure, axes = sheet(2, 4.9)
    for column, (each, text) in enumerate(zip(axes, titles, strict=True)):
        # `best` comes last, on top of the others.
        for name in sorted(names, key="best".__eq__):
            places = [place for place, width in enumerate(widths) if (width, name) in figures]
            values = [figures[widths[place], name][column] for place in places]
            style = {"color": colours.get(name, FAINT), "markersize": 7 if name == "best" else 5}
            each.plot(places, values, "o", label=name, **style)
        each.set_xticks(range(len(widths)), widths)
        title(each, text, "", "")
    axes[1].set_yscale("log")
    axes[1].set_yticks((0.01, 0.02, 0.05, 0.1, 0.2), ("1 %", "2 %", "5 %", "10 %", "20 %"))
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    marks = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    shown = {"best": "best", "minmax": "minmax", "tfmq": "the eight papers' methods"}
    axes[0].legend([marks[name] for name in shown], shown.values(), frameon=False, fontsize=8)
    figure.savefig(path)


def method_figures() -> dict[tuple[str, str], tuple[float, float]]:
    """PSNR and step error in docs/results.md, by width and method."""
    table = [line for line in section(RESULTS.read_text(), MODEL) if line.startswith("|")]
    head, _, *rows = [[part.strip() for part in line.split("|")[1:-1]] for line in table]
    figures = {}
    for row in rows:
        cell = dict(zip(head, row, strict=True))
        numbers = (mean(cell["PSNR to float, dB"]), mean(cell["step error"]))
        figures[cell["bits"], cell["method"]] = numbers
    return figures


def section(page: str, model: str) -> list[str]:
    return page.partition(f"## {model}\n")[2].partition("\n## ")[0].splitlines()


def mean(text: str) -> float:
    """'36.15 ± 0.67' -> 36.15."""
    return float(text.split("±")[0])


DRAWN = (
    temporal_mismatch,
    temporal_damage,
    channel_ranges,
    softmax_tails,
    softmax_grids,
    kurtosis_bits,
    shortcut_halves,
    drawn_timesteps,
    quantization_noise,
    learnt_scales,
    every_method,
)
# Drawn only if it is named: it takes hours.
LONG = (temporal_damage_of_cifar10,)
FIGURES = {draw.__name__.replace("_", "-"): draw for draw in (*DRAWN, *LONG)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], help="which ones; all if none is named")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or list(FIGURES)[: len(DRAWN)]:
        path = options.out / f"{name}.png"
        FIGURES[name](path)
        print(path)


if __name__ == "__main__":
    main()
