"""The sections of the page: tables and plots, or none where the evidence lacks the data."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lowtide.report.evidence import ErrorTable, Evidence, LayerBits, Measure, Model
from lowtide.report.page import plots
from lowtide.report.page.parts import Cell, Plot, Table
from lowtide.report.wording import NOTHING, counted, figures, lasting, metric_name, percent, size

_WORST = 10
_PREDICTED = {"bytes": "Size on disk", "peak_bytes": "Peak memory", "minutes": "Time"}
Parts = list[Table | Plot]


def _models(evidence: Evidence, models: Sequence[Model], label: str) -> list[Cell | str]:
    return [label, *(Cell(model.name, colour=evidence.colour(model)) for model in models)]


def metrics(evidence: Evidence) -> Parts:
    """Every metric of every model, the best of the quantized ones in bold."""
    names = dict.fromkeys(name for model in evidence.models for name in model.metrics)
    head = _models(evidence, evidence.models, "Metric")
    rows = [_metric(evidence, name) for name in names]
    how = Table("How they were measured", ("Metric", ""), [_how(evidence, name) for name in names])
    return [Table("Metrics", head, rows, folded=False), how] if rows else []


def _metric(evidence: Evidence, name: str) -> list[Cell | str]:
    others = [model.metrics[name] for model in evidence.others if name in model.metrics]
    values = [measure.value for measure in others if not math.isnan(measure.value)]
    known = next(model.metrics[name] for model in evidence.models if name in model.metrics)
    # One model alone is not the best of anything, and the reference does not compete.
    best = (max if known.higher_is_better else min)(values) if len(values) > 1 else None
    better = "↑ higher is better" if known.higher_is_better else "↓ lower is better"
    row: list[Cell | str] = [Cell(metric_name(name), better)]
    for model in evidence.models:
        compete = model is not evidence.reference
        row.append(_measure(model.metrics.get(name), best if compete else None))
    return row


def _measure(measure: Measure | None, best: float | None) -> Cell:
    if measure is None:
        return Cell(NOTHING)
    interval = ""
    if measure.low is not None and measure.high is not None:
        interval = f"{figures(measure.low, 4)} to {figures(measure.high, 4)}"
    return Cell(figures(measure.value, 4), interval, strong=measure.value == best)


def _how(evidence: Evidence, name: str) -> tuple[str, str]:
    """How a metric was measured; the first model speaks for all, which are measured alike."""
    known = next(model.metrics[name] for model in evidence.models if name in model.metrics)
    about = [f"{key.replace('_', ' ')} {value}" for key, value in known.about.items()]
    about += [counted(known.n, "image")] if known.n else []
    return metric_name(name), ", ".join(about) or NOTHING


def pareto(evidence: Evidence) -> Parts:
    """Size against PSNR."""
    points = [
        _point(model, evidence.colour(model), model.metrics["psnr"])
        for model in evidence.others
        if "psnr" in model.metrics and math.isfinite(model.metrics["psnr"].value)
    ]
    if not points:
        return []
    words = [f"{each.name} {size(each.x[0])}, {each.y[0]:.2f} dB" for each in points]
    label = f"Size and PSNR: {'; '.join(words)}."
    svg = plots.plot(label, lambda width: plots.pareto(width, points, evidence.reference))
    return [Plot(svg)]


def _point(model: Model, colour: int, psnr: Measure) -> plots.Series:
    interval = [math.nan if end is None else end for end in (psnr.low, psnr.high)]
    return plots.Series(
        model.name, colour, (model.bytes,), (psnr.value,), (interval[0], interval[1])
    )


def trajectory(evidence: Evidence) -> Parts:
    """The distance of x_t from the reference's path after each step."""
    tables = {model.key: model.trajectory for model in evidence.others if model.trajectory}
    return _along(evidence, tables, "relative L2 of the sample", log=False)


def _along(evidence: Evidence, tables: Mapping[str, ErrorTable], title: str, *, log: bool) -> Parts:
    """One line for each model; models of another schedule cannot share the axis."""
    timesteps = next((table.timesteps for table in tables.values()), ())
    if len(timesteps) < 2:
        return []
    models = [model for model in evidence.others if model.key in tables]
    shared = [model for model in models if tables[model.key].timesteps == timesteps]
    values = [average(tables[model.key]) for model in shared]
    series = [
        plots.Series(model.name, evidence.colour(model), timesteps, each)
        for model, each in zip(shared, values, strict=True)
    ]
    ends = "; ".join(f"{line.name} ends at {figures(line.y[-1])}" for line in series)
    label = f"{title} by timestep: {ends}."
    svg = plots.plot(label, lambda width: plots.lines(width, series, title, log=log))
    rows = [[str(t), *map(figures, column)] for t, *column in zip(timesteps, *values, strict=True)]
    odd = ", ".join(model.name for model in models if model not in shared)
    note = f"Left out, on other timesteps: {odd}." if odd else ""
    table = Table("All values", _models(evidence, shared, "Timestep"), rows)
    return [Plot(svg, note=note), table]


def average(table: ErrorTable) -> np.ndarray:
    """The mean over the rows that are numbers, at each timestep: (timesteps,)"""
    known = np.isfinite(table.error)
    sums = np.where(known, table.error, 0).sum(0)
    return np.where(known.any(0), sums / np.maximum(known.sum(0), 1), np.nan)


def layers(evidence: Evidence) -> Parts:
    """The error of each layer at each timestep."""
    tables = [(model.name, model.layers) for model in evidence.others if model.layers]
    return _heat(tables, "relative L2 of the layer’s output", "Layer")


def _heat(tables: Sequence[tuple[str, ErrorTable]], what: str, noun: str) -> Parts:
    if not tables:
        return []
    worst = [_worst(name, table, noun) for name, table in tables]
    tops = [f"{table.label}: {', '.join(map(str, table.rows[0]))}" for table in worst if table.rows]
    label = f"{what} by timestep. {'; '.join(tops)}."
    return [Plot(plots.plot(label, lambda width: plots.heat_maps(width, tables, what))), *worst]


def _worst(model: str, table: ErrorTable, noun: str) -> Table:
    """The rows with the largest errors, each with the timestep of its largest."""
    errors = np.where(np.isfinite(table.error), table.error, -1)
    order = np.argsort(-errors.max(1), kind="stable")[:_WORST]
    rows = [
        (table.names[row], str(table.timesteps[errors[row].argmax()]), figures(errors[row].max()))
        for row in order
        if errors[row].max() >= 0
    ]
    return Table(f"Largest errors of {model}", (noun, "Timestep", "Error"), rows)


def temporal(evidence: Evidence) -> Parts:
    """The drift of the temporal features: the mean over all, then each by itself."""
    tables = {model.key: model.temporal for model in evidence.others if model.temporal}
    named = [(model.name, model.temporal) for model in evidence.others if model.temporal]
    mean = _along(evidence, tables, "mean squared error of the features", log=True)
    return [*mean, *_heat(named, "squared error of the feature", "Feature")]


def bits(evidence: Evidence) -> Parts:
    """Bits and kernel of each layer, for each model."""
    return [part for model in evidence.others if model.bits for part in _bits(model)]


def _bits(model: Model) -> Parts:
    total = sum(layer.parameters for layer in model.bits) or 1
    mean = sum(layer.weights * layer.parameters for layer in model.bits) / total
    kinds = _tally(map(_pair, model.bits))
    kernels = _tally(f"run by {layer.kernel}" for layer in model.bits if layer.kernel)
    note = f"{kinds}; {figures(mean)} bits per weight on average."
    note += f" {kernels}." if kernels else ""
    label = f"Bits of the layers of {model.name}: {kinds}."
    svg = plots.plot(label, lambda width: plots.bits(width, model.bits))
    heads = ("Layer", "Weights", "Inputs", "Parameters", "Kernel")
    table = Table(f"All {len(model.bits)} layers", heads, [_layer_row(each) for each in model.bits])
    return [Plot(svg, model.name, note), table]


def _pair(layer: LayerBits) -> str:
    """at W4A8, at W8 with inputs in float, or in float"""
    if layer.weights >= plots.FLOAT_BITS:
        return "in float"
    weights = f"at W{layer.weights:g}"
    if layer.inputs is None:
        return weights
    floating = layer.inputs >= plots.FLOAT_BITS
    return f"{weights} with inputs in float" if floating else f"{weights}A{layer.inputs:g}"


def _tally(kinds: Iterable[str]) -> str:
    """36 layers at W4A8, 2 layers in float"""
    counts = Counter(kinds).most_common()
    return ", ".join(f"{counted(count, 'layer')} {kind}" for kind, count in counts)


def _layer_row(layer: LayerBits) -> list[str]:
    inputs = NOTHING if layer.inputs is None else f"{layer.inputs:g}"
    kernel = layer.kernel or NOTHING
    return [layer.name, f"{layer.weights:g}", inputs, f"{layer.parameters:,}", kernel]


def time(evidence: Evidence) -> Parts:
    """The duration of each stage of each model."""
    models = [model for model in evidence.others if sum(model.stages.values()) > 0]
    spent = [name for model in models for name, seconds in model.stages.items() if seconds > 0]
    names = dict.fromkeys(spent)
    longest = max((max(model.stages.values()) for model in models), default=0)
    rows = [[name, *(_stage(model, name, longest) for model in models)] for name in names]
    totals = [Cell(lasting(sum(model.stages.values())), strong=True) for model in models]
    head = _models(evidence, models, "Stage")
    return [Table("Stages", head, [*rows, ["In all", *totals]], folded=False)] if models else []


def _stage(model: Model, name: str, longest: float) -> Cell:
    spent = model.stages.get(name, 0.0)
    share = percent(spent / sum(model.stages.values()))
    return Cell(lasting(spent), share, bar=(0, spent / longest)) if spent else Cell(NOTHING)


def predicted(evidence: Evidence) -> Parts:
    """What `lowtide plan` said before the run, and what the run came to."""
    tables = [_predictions(model) for model in evidence.others]
    return [table for table in tables if table.rows]


def _predictions(model: Model) -> Table:
    rows = []
    for key, name in _PREDICTED.items():
        values = [numbers.get(key, 0.0) for numbers in (model.predicted, model.real)]
        if all(values):
            words = [lasting(60 * value) if key == "minutes" else size(value) for value in values]
            rows.append([name, *words, f"{figures(values[1] / values[0])}×"])
    head = (Cell(model.name, strong=True), "Predicted", "Real", "Real to predicted")
    return Table(f"Predicted against real: {model.name}", head, rows, folded=False)


def left(evidence: Evidence) -> Parts:
    """The layers in float by reason; models that are alike share a table."""
    groups: dict[tuple[tuple[str, str], ...], list[Model]] = {}
    for model in evidence.others:
        if model.left:
            groups.setdefault(tuple(model.left.items()), []).append(model)
    return [table for models in groups.values() for table in _in_float(models)]


def _in_float(models: Sequence[Model]) -> Parts:
    reasons: dict[str, list[str]] = {}
    for name, why in models[0].left.items():
        reasons.setdefault(why, []).append(name)
    share = models[0].float_share
    head = Cell(
        "Reason", "" if share is None else f"{percent(share)} of the parameters except biases"
    )
    rows = [
        (
            why,
            Cell(
                counted(len(names), "layer"), ", ".join(dict.fromkeys(map(plots.part_name, names)))
            ),
        )
        for why, names in reasons.items()
    ]
    label = ", ".join(model.name for model in models)
    names = Table("All layers left in float", ("Layer", "Reason"), list(models[0].left.items()))
    return [Table(label, (head, label), rows, folded=False), names]


def drawn(evidence: Evidence) -> dict[str, Parts]:
    """The parts of each section, by its name."""
    sections = (metrics, pareto, trajectory, layers, temporal, bits, time, predicted, left)
    return {section.__name__: section(evidence) for section in sections}
