"""Where the error comes from: along the trajectory, layer by layer, and in the temporal features."""

from collections.abc import Sequence

import numpy as np

from lowtide.report.page.evidence import Drift, Evidence, Model
from lowtide.report.page.heat import heat_maps
from lowtide.report.page.markup import Html, figures, join, tag
from lowtide.report.page.plot import Axis, Line, Scale, lines, scale


def trajectory(evidence: Evidence) -> Html | None:
    """How far x_t has left the float model's path after each step."""
    found = [(model, model.trajectory) for model in evidence.others if model.trajectory]
    return along(evidence, found, "relative L2 of the sample", "Trajectory error", log=False)


def along(evidence: Evidence, found: Sequence[tuple[Model, Drift]], title: str, label: str, *, log: bool) -> Html | None:
    """One line for each model over the timesteps, from noise to image; models of another schedule cannot share the axis."""
    shared = [(model, drift) for model, drift in found if drift.timesteps == found[0][1].timesteps]
    if not shared or len(shared[0][1].timesteps) < 2:
        return None
    timesteps = shared[0][1].timesteps
    series = [Line(evidence.number(model), model.name, average(drift)) for model, drift in shared]
    values = [value for line in series for value in line.values]
    x = Axis("timestep, from noise to image", Scale(timesteps[0], timesteps[-1]), lambda value: f"{value:.0f}")
    y = Axis(title, scale(values, log=log, zero=not log), tick_text)
    ends = "; ".join(f"{line.name} ends at {figures(line.values[-1])}" for line in series)
    plot = lines(timesteps, series, x, y, label=f"{label} by timestep: {ends}.")
    odd = [model.name for model, _ in found if model not in [each for each, _ in shared]]
    return join([plot, tag("p", f"Left out, on other timesteps: {', '.join(odd)}.", class_="note") if odd else None])


def tick_text(value: float) -> str:
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else figures(value, 1)


def average(drift: Drift) -> list[float]:
    """The mean over the rows that are numbers, at each timestep."""
    known = np.isfinite(drift.error)
    counts = known.sum(0)
    sums = np.where(known, drift.error, 0).sum(0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).tolist()


def layers(evidence: Evidence) -> Html | None:
    found = [(model.name, model.layers) for model in evidence.others if model.layers]
    return heat_maps(found, "layers", "relative L2 of the layer’s output", rows="layer") if found else None


def temporal(evidence: Evidence) -> Html | None:
    found = [(model, model.temporal) for model in evidence.others if model.temporal]
    if not found:
        return None
    maps = heat_maps([(model.name, drift) for model, drift in found], "temporal", "squared error of the feature", rows="feature")
    mean = along(evidence, found, "mean squared error", "Mean squared error of the temporal features", log=True)
    return join([mean, maps])
