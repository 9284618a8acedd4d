"""Figures of what quantized time does: to temporal features, and by them to images."""

from pathlib import Path

import numpy as np
from drawing import SMALL, title
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from lowtide import quantization, sampling
from lowtide.evaluation import path_errors
from lowtide.methods import relevant_options
from lowtide.models import adapt
from lowtide.report.palette import ACCENT, HAIR, INK, QUIET, RAMPS

SENSITIVE = "zoo:cifar10-small"
LARGE = "zoo:cifar10"
METHODS = ("minmax", "qdiffusion", "tfmq", "temporal_cache")
IMAGES = 16
RAMP = LinearSegmentedColormap.from_list("errors", RAMPS["light"])


def temporal_damage(path: Path) -> None:
    """Of the small model of the package."""
    _draw(path, SENSITIVE, SMALL | {"images": IMAGES})


def temporal_damage_of_cifar10(path: Path) -> None:
    """Of the papers' own benchmark; hours on a CPU."""
    _draw(path, LARGE, SMALL | {"images": IMAGES, "calibration_steps": 10, "iters": 50})


def _draw(path: Path, model: str, settings: dict[str, int]) -> None:
    """The error of the temporal features, and what it alone does to the images.

    The images are drawn by the float network with the features of the quantized one.
    """
    request = sampling.Request(steps=20, seeds=tuple(range(IMAGES)), batch=IMAGES)
    floating = sampling.load_pipeline(model)
    denoiser = sampling.denoiser(floating)
    original = path_errors.draw(floating, request)
    adapter = adapt(denoiser, original.calls[0].arguments)
    damages: dict[str, path_errors.TemporalDamage] = {}
    parts: dict[str, path_errors.ErrorParts] = {}
    whole: dict[str, float] = {}
    for method in METHODS:
        pipe = sampling.load_pipeline(model)
        asked = settings | {"weights": 4, "inputs": 8}
        quantization.quantize(pipe, method=method, **relevant_options(method, asked))
        packed = sampling.denoiser(pipe)
        damage = path_errors.temporal_damage(floating, packed, adapter, request)
        assert damage is not None
        drawn = path_errors.draw(pipe, request)
        damages[method] = damage
        parts[method] = path_errors.error_parts(denoiser, drawn.calls)
        whole[method] = path_errors.image_error(drawn.images, original.images)
    alone = {
        method: path_errors.image_error(damage.images, original.images)
        for method, damage in damages.items()
    }
    _sheet(damages, parts, whole, alone).savefig(path)
    for method in METHODS:
        errors = damages[method].errors
        print(
            f"{method}: features off by {errors.mean():.4f}; "
            f"answers by {parts[method].whole:.4f}, {parts[method].steady:.4f} of it steady; "
            f"images by {whole[method]:.4f}, by the features alone {alone[method]:.4f}"
        )


def _sheet(
    damages: dict[str, path_errors.TemporalDamage],
    parts: dict[str, path_errors.ErrorParts],
    whole: dict[str, float],
    alone: dict[str, float],
) -> Figure:
    """Maps of the features' errors above; errors of answers and of images below."""
    figure = Figure(figsize=(11, 6.6), dpi=160, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    _maps(above, damages)
    left, right = below.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(HAIR)
    answers = {method: part.whole for method, part in parts.items()}
    steady = {method: part.steady for method, part in parts.items()}
    _bars(left, answers, steady, ("the whole error", "its part that is steady over images, steps"))
    title(left, "Answers on the method's own path", "", "relative L2 error")
    _bars(right, whole, alone, ("all of the network quantized", "only the temporal features"))
    title(right, "Images", "", "relative L2 error")
    return figure


def _maps(place: Figure, damages: dict[str, path_errors.TemporalDamage]) -> None:
    """One map of blocks and timesteps for each method, in one scale of colours."""
    every = np.concatenate([damage.errors.ravel() for damage in damages.values()])
    norm = LogNorm(every[every > 0].min(), every.max())
    panels = place.subplots(1, len(damages), sharey=True)
    for axes, (method, damage) in zip(panels, damages.items(), strict=True):
        errors = np.maximum(damage.errors.T, norm.vmin)
        image = axes.imshow(errors, aspect="auto", cmap=RAMP, norm=norm, interpolation="nearest")
        columns = range(0, len(damage.timesteps), 5)
        axes.set_xticks(columns, [f"{damage.timesteps[column]:.0f}" for column in columns])
        axes.set_yticks(range(len(damage.features)), range(1, len(damage.features) + 1))
        axes.spines[:].set_visible(False)
        title(axes, f"{method}: mean {damage.mean:.3f}", "timestep", "")
    panels[0].set_ylabel("temporal feature, by block", fontsize=8.5, color=QUIET)
    bar = place.colorbar(image, ax=list(panels), fraction=0.04, pad=0.01)
    bar.set_label("relative L2 error of the feature", fontsize=8.5, color=QUIET)
    bar.ax.tick_params(which="both", labelsize=8, colors=QUIET)
    bar.outline.set_visible(False)


def _bars(
    axes: Axes, wide: dict[str, float], narrow: dict[str, float], labels: tuple[str, str]
) -> None:
    """Two bars a method, one within the other, each with its value."""
    places = range(len(wide))
    axes.bar(places, wide.values(), 0.7, color=HAIR, label=labels[0])
    axes.bar(places, narrow.values(), 0.4, color=ACCENT, label=labels[1])
    for values, colour in ((wide, INK), (narrow, ACCENT)):
        for place, value in enumerate(values.values()):
            axes.annotate(
                f"{value:.3f}",
                (place, value),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=colour,
            )
    axes.set_xticks(places, wide)
    axes.legend(frameon=False, fontsize=8)
