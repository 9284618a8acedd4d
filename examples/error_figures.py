"""Figures of errors: of the predictions of ptq4dm, ptqd and efficientdm."""

from pathlib import Path

import torch
from drawing import fitted, held_out, noise, sheet, title
from matplotlib.colors import LogNorm
from matplotlib.ticker import PercentFormatter

from lowtide.methods import ptqd
from lowtide.methods.ptq4dm import NDTC
from lowtide.nn.swap import find_clock, quantizers
from lowtide.report.palette import ACCENT, FAINT, HAIR, INK
from lowtide.stages.base import run_recipe
from lowtide.stages.distill import Distill


def drawn_timesteps(path: Path) -> None:
    """Which timesteps NDTC draws, and what ranges fitted on them are worth at each step."""
    calls = held_out()
    options = {"weights": 8, "inputs": 4, "images": 8, "calibration_steps": 40}
    drawn = fitted(NDTC(), **options)
    spread = fitted(**options)
    timesteps = sorted(find_clock(drawn.model).known)
    count = len(drawn.calls)
    many = NDTC().draw(100_000, len(timesteps), torch.Generator().manual_seed(0))
    chances = many.bincount(minlength=len(timesteps)) / 1e5
    figure, (left, right) = sheet(2)
    shares = [drawn.report["ndtc"].get(timestep, 0) / count for timestep in timesteps]
    left.bar(timesteps, shares, 36, color=ACCENT, label=f"{count} draws")
    dots = {"marker": "o", "markersize": 3, "linewidth": 1}
    left.plot(timesteps, chances, color=INK, label="expected of NDTC", **dots)
    left.axhline(1 / len(timesteps), color=FAINT, linewidth=1.6, label="evenly spread")
    left.yaxis.set_major_formatter(PercentFormatter(1, 0))
    ends = f"{100 * (shares[0] + shares[-1]):.0f} % of the draws are first or last step"
    title(left, ends, "timestep", "share of calibration")
    for job, colour, label in ((spread, FAINT, "evenly spread"), (drawn, ACCENT, "NDTC")):
        moments = noise(job, calls)
        label = f"{label}: {moments.error():.3f} over all steps"
        known = list(find_clock(job.model).known)
        right.plot(known, moments.snr().rsqrt(), color=colour, linewidth=1.6, label=label)
    right.set_yscale("log")
    title(right, "Error of the answer at W8A4, unseen images", "timestep", "relative L2 error")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=8, loc="upper center" if axes is left else "upper left")
    figure.savefig(path)
    ratio = find_clock(drawn.model).scale[:, 0] / find_clock(spread.model).scale[:, 0]
    moved = ratio.log2().abs()
    median = 100 * (2 ** moved.quantile(0.5).item() - 1)
    most = 100 * (2 ** moved.quantile(0.9).item() - 1)
    print(
        f"NDTC moves the range of half the inputs by less than {median:.1f} %, "
        f"of nine in ten by less than {most:.0f} %"
    )


def quantization_noise(path: Path) -> None:
    """The error against the prediction at one step, and the error left at each step after PTQD."""
    calls = held_out()
    job = fitted(images=8)
    known = find_clock(job.model).known
    before = noise(job, calls)
    timestep, step = next(iter(known.items()))
    (call,) = [call for call in calls if call.timestep == timestep]
    eps = ptqd.answer(job, call, quantized=False).flatten()
    error = ptqd.answer(job, call, quantized=True).flatten() - eps
    run_recipe((ptqd.CNC(), ptqd.Bias()), job)
    after = noise(job, calls)
    slope = ptqd.attached(job).slope[step].item()
    figure, (left, right) = sheet(2)
    # The grey scale begins below one, so that a bin with a single value is visible.
    left.hexbin(eps, error, gridsize=45, norm=LogNorm(0.1), mincnt=1, cmap="Greys", linewidths=0)
    ends = torch.stack([eps.min(), eps.max()])
    line = slope * ends + (error.mean() - slope * eps.mean())
    left.plot(ends, line, color=ACCENT, linewidth=1.6, label=f"slope {slope:.4f}")
    text = f"Timestep {timestep}: error against answer"
    title(left, text, "float answer eps", "quantized - float answer, D")
    lines = ((before, FAINT, "as rounded"), (after, ACCENT, "after CNC and bias"))
    for moments, colour, label in lines:
        right.plot(list(known), spread_of(moments), color=colour, linewidth=1.6, label=label)
    right.set_yscale("log")
    removed = 1 - (spread_of(after) / spread_of(before)).median()
    text = f"PTQD takes off {100 * removed:.0f} % at the median step"
    title(right, text, "timestep", "root mean square of D")
    right.invert_xaxis()
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)


def spread_of(moments: ptqd.Moments) -> torch.Tensor:
    """Root mean square of D at each step: (steps,)."""
    return moments.noise_noise.mean(1).sqrt()


def learnt_scales(path: Path) -> None:
    """How far distillation moves the input scales at each step, and the error before and after."""
    calls = held_out()
    job = fitted(per_step=True, weights=4, inputs=4, images=8)
    clock = find_clock(job.model)
    timesteps = list(clock.known)
    scales = clock.scale.clone()
    before = noise(job, calls)
    run_recipe((Distill(),), job)
    after = noise(job, calls)
    moved = clock.scale / scales
    rows = {name: moved[quantizer.row] for name, quantizer in quantizers(job.model).items()}
    most = max(rows, key=lambda name: rows[name].log().std())
    figure, (left, right) = sheet(2)
    left.plot(timesteps, moved.T, color=HAIR, linewidth=0.8)
    left.plot(timesteps, rows[most], color=ACCENT, linewidth=1.6, label=most)
    left.set_ylim(top=1.12 * moved.max().item())
    title(left, "Each input's scale at each step", "timestep", "scale after / before distillation")
    for moments, colour, label in ((before, FAINT, "before"), (after, ACCENT, "after")):
        label = f"{label}: {moments.error():.3f} over all steps"
        right.plot(timesteps, moments.snr().rsqrt(), color=colour, linewidth=1.6, label=label)
    right.set_yscale("log")
    text = f"Error at W4A4, {job.settings.iters} iterations"
    title(right, text, "timestep", "relative L2 error, unseen images")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)
