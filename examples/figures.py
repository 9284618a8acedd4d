"""Draw the figures of docs/methods from zoo:digits: `python examples/figures.py`; each shows what one paper is about."""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from lowtide import run, sample
from lowtide.methods import tcaq
from lowtide.methods.mpq import OMQ, kurtosis
from lowtide.models import adapt
from lowtide.nn.swap import look, quant_layers
from lowtide.plan import Settings
from lowtide.report.ink import ACCENT, FAINT, HAIR, INK, QUIET
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.features import Features
from lowtide.stages.products import watched
from lowtide.stages.ranges import FitRanges, watch
from lowtide.stages.tails import power_law_wins
from lowtide.stages.weights import FitWeights

MODEL = "zoo:digits"
LAYER = "up_blocks.2.resnets.0.conv1"
SMALL = {"steps": 20, "images": 4, "kept": 20, "iters": 100, "batch": 16}


def started(**settings) -> Job:
    pipe = sample.load_pipeline(MODEL)
    job = Job(pipe, pipe.unet.requires_grad_(False), adapt(pipe.unet), Settings(**SMALL | settings), "figures")
    run_recipe((Collect(), Assign(per_step=True)), job)
    return job


def sheet(columns: int, width: float = 4.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, 3.6), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(HAIR)
        each.tick_params(colors=QUIET, labelsize=8, length=0)
    return figure, axes


def title(axes: Axes, text: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, fontsize=8.5, color=QUIET)
    axes.set_ylabel(ylabel, fontsize=8.5, color=QUIET)


def features(model: torch.nn.Module, unit, adapter, timesteps: list[int]) -> torch.Tensor:
    """All features of a block side by side, timesteps x values."""
    rows = [{"timestep": torch.tensor(float(timestep))} for timestep in timesteps]
    clock = getattr(model, "lowtide_clock", None)
    if clock is not None:
        clock.set(torch.tensor(timesteps))
    with torch.no_grad():
        return torch.cat(Features(adapter, unit, rows)(model), 1)


def temporal_mismatch(path: Path) -> None:
    """Which float timestep each quantized feature looks like, and how far off it is."""
    floating = sample.load_pipeline(MODEL).unet
    adapter = adapt(floating)
    (unit,) = adapter.temporal()
    fine = list(range(1000))
    finely = features(floating, unit, adapter, fine)
    figure, (left, right) = sheet(2)
    left.axhline(0, color=HAIR, linewidth=5, solid_capstyle="round")
    for method, colour in (("minmax", FAINT), ("tfmq", INK), ("temporal_cache", ACCENT)):
        pipe = sample.load_pipeline(MODEL)
        run.quantize(pipe, method=method, weights=4, inputs=8, **SMALL)
        timesteps = pipe.unet.lowtide_clock.timesteps.tolist()
        ours, coarse = features(pipe.unet, unit, adapter, timesteps), finely[timesteps]
        nearest = torch.cdist(ours, finely).argmin(1)
        away = [int(near) - timestep for near, timestep in zip(nearest, timesteps, strict=True)]
        left.plot(timesteps, away, color=colour, marker="o", markersize=3, linewidth=1, label=method)
        right.plot(timesteps, (ours - coarse).norm(dim=1) / coarse.norm(dim=1), color=colour, linewidth=1.6, label=method)
    title(left, "How far off the network takes the time to be", "timestep", "nearest float timestep - timestep")
    title(right, "How far the features are off", "timestep", "relative L2 error")
    right.set_yscale("log")
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
        image = each.imshow((values[:, order] / values.max()).numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
        each.yaxis.set_major_locator(MaxNLocator(integer=True))
        share = (values.amax(1) / values.median(1).values).mean()
        title(each, f"{text}: peak is {share:.1f} x the median channel", "input channel, heaviest first", "step, noise to image")
    figure.colorbar(image, ax=axes, label="share of the largest peak", shrink=0.9).outline.set_visible(False)
    figure.savefig(path)


def softmax_tails(path: Path) -> None:
    """Softmax outputs at one step, and along the steps how much better a power law fits each attention than an exponential."""
    job = started()
    run_recipe((FitWeights("mse"), FitRanges("minmax")), job)
    seen = watch(job, keep=True)
    look(job.model, False, False)
    tails = {name: tail_ratios(seen[f"{name}.processor.softmax"].values) for name in job.plan.attentions}
    name = max(tails, key=lambda name: max(tails[name]))
    step = int(np.argmax(tails[name]))
    values = torch.cat(seen[f"{name}.processor.softmax"].values[step]).numpy()
    figure, (left, right) = sheet(2)
    left.hist(values[values > 0], bins=np.geomspace(max(values.min(), 1e-7), values.max(), 60), color=ACCENT)
    left.set(xscale="log", yscale="log")
    left.xaxis.set_minor_formatter(NullFormatter())
    title(left, f"{name}, step {step + 1}", "softmax output", "count")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.axhline(0, color=HAIR, linewidth=1)
    for attention, ratios in tails.items():
        right.plot(range(1, len(ratios) + 1), ratios, color=ACCENT if attention == name else FAINT, linewidth=1.6)
    log2 = np.mean([ratio > 0 for ratios in tails.values() for ratio in ratios])
    title(right, f"log2 (R > 0) at {100 * log2:.0f} % of steps", "step, noise to image", "R per value")
    figure.savefig(path)


def tail_ratios(values: list[list[torch.Tensor]]) -> list[float]:
    return [power_law_wins(torch.cat(step).numpy(), ("exponential",), 0.5) for step in values]


def kurtosis_bits(path: Path) -> None:
    """Kurtosis of output channels against the bits OMQ deals them at W3."""
    job = started(weights=3, inputs=6)
    OMQ().run(job)
    layers = {name: layer for name, layer in quant_layers(job.model) if isinstance(layer.format.bits, tuple)}
    heavy = {name: kurtosis(layer.whole_weight().flatten(1).float()) for name, layer in layers.items()}
    name = max(layers, key=lambda name: len(set(layers[name].format.bits)) * 1000 + heavy[name].std().item())
    bits = torch.tensor(layers[name].format.bits)
    figure, axes = sheet(2)
    order = heavy[name].argsort(descending=True)
    colours = {2: FAINT, 3: INK, 4: ACCENT}
    axes[0].bar(range(len(order)), heavy[name][order].numpy(), color=[colours[int(bit)] for bit in bits[order]], width=1)
    for bit, colour in colours.items():
        axes[0].bar([0], [0], color=colour, label=f"{bit} bits")
    axes[0].legend(frameon=False, fontsize=8)
    title(axes[0], name, "output channel, heaviest tail first", "kurtosis of its weights")
    counts = [sum(layer.format.bits.count(bit) for layer in layers.values()) for bit in colours]
    axes[1].bar([str(bit) for bit in colours], counts, color=list(colours.values()), width=0.6)
    title(axes[1], f"All layers: {job.report['mpq']['average_bits']:.3f} bits on average", "bits", "channels")
    figure.savefig(path)


FIGURES = {
    "temporal-mismatch": temporal_mismatch,
    "channel-ranges": channel_ranges,
    "softmax-tails": softmax_tails,
    "kurtosis-bits": kurtosis_bits,
}


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
