"""The sections of the page: tables and plots, or none where the evidence lacks the data."""

import math
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

from markupsafe import Markup

from lowtide.report.evidence import ErrorTable, Evidence, LayerBits, Measurement, Model
from lowtide.report.page import plots
from lowtide.report.page.parts import Cell, Table
from lowtide.report.wording import counted, figures, lasting, metric_name, part_name, percent, size

_FLOAT_BITS = 16
_AVERAGE = "bits per weight, on average"
_ALL = "In all"
_WORST = 10
_PREDICTED = {"bytes": "Size on disk", "peak_bytes": "Peak memory", "minutes": "Time"}
Parts = list[Table | Markup]
Value = TypeVar("Value")


def _beside(
    evidence: Evidence,
    label: str,
    rows: Mapping[str, Cell | str],
    columns: Mapping[str, Value],
    cell: Callable[[Value, str], Cell | str],
) -> Table:
    """A table with models side by side: `cell` draws a row, by its key, of a model's value."""
    heads = [Cell(evidence.models[key].name, colour=evidence.colour(key)) for key in columns]
    cells = [
        [head, *(cell(value, row) for value in columns.values())] for row, head in rows.items()
    ]
    return Table(label, [label, *heads], cells, folded=False)


def metrics(evidence: Evidence) -> Parts:
    """Every metric of every model, the best of the quantized ones in bold."""
    known = dict(ChainMap(*(model.metrics for model in evidence.models.values())))
    if not known:
        return []
    better = {True: "↑ higher is better", False: "↓ lower is better"}
    rows = {name: Cell(metric_name(name), better[known[name].higher_is_better]) for name in known}
    best = {name: _best(evidence, name) for name in known}

    def cell(model: Model, name: str) -> Cell:
        measurement = model.metrics.get(name)
        if measurement is None:
            return Cell()
        interval = " to ".join(figures(end, 4) for end in measurement.interval or ())
        strong = measurement is best[name]
        return Cell(figures(measurement.value, 4), interval, strong=strong)

    how = Table("How they were measured", ("Metric", ""), [*map(_how, known, known.values())])
    return [_beside(evidence, "Metric", rows, evidence.models, cell), how]


def _best(evidence: Evidence, name: str) -> Measurement | None:
    """The best of the quantized models, if at least two can be compared."""
    others = [model.metrics[name] for model in evidence.others.values() if name in model.metrics]
    known = [each for each in others if not math.isnan(each.value)]
    if len(known) < 2:
        return None
    return (max if known[0].higher_is_better else min)(known, key=lambda each: each.value)


def _how(name: str, known: Measurement) -> tuple[str, str]:
    """How a metric was measured; one model speaks for all, which are measured alike."""
    weights = f"weights {known.weights}, " if known.weights else ""
    about = f"backend {known.backend}, {weights}resize {known.resize}, seeds {known.seeds}"
    return metric_name(name), f"{about}, {counted(known.n, 'image')}"


def trajectory(evidence: Evidence) -> Parts:
    """The distance of x_t from the reference's path after each step."""
    errors = {key: model.trajectory for key, model in evidence.others.items()}
    tables = {key: each.table() for key, each in errors.items() if each}
    return _along(evidence, tables, "relative L2 of the sample", log=False)


def layers(evidence: Evidence) -> Parts:
    """The error of each layer at each timestep."""
    errors = {key: model.layers for key, model in evidence.others.items()}
    tables = {key: each.table() for key, each in errors.items() if each}
    return _heat(evidence, tables, "relative L2 of the layer’s output", "Layer")


def temporal(evidence: Evidence) -> Parts:
    """The drift of the temporal features: the mean over all, then each by itself."""
    errors = {key: model.temporal for key, model in evidence.others.items()}
    tables = {key: each.table() for key, each in errors.items() if each}
    mean = _along(evidence, tables, "mean squared error of the features", log=True)
    return [*mean, *_heat(evidence, tables, "squared error of the feature", "Feature")]


def _along(evidence: Evidence, tables: Mapping[str, ErrorTable], title: str, *, log: bool) -> Parts:
    """One line for each model that has the timesteps of the first."""
    timesteps = next((table.timesteps for table in tables.values()), ())
    if len(timesteps) < 2:
        return []
    shared = {key: table for key, table in tables.items() if table.timesteps == timesteps}
    values = {key: table.average() for key, table in shared.items()}
    lines = [
        plots.Line(evidence.models[key].name, evidence.colour(key), errors)
        for key, errors in values.items()
    ]
    ends = "; ".join(f"{line.name} ends at {figures(line.errors[-1])}" for line in lines)
    label = f"{title} by timestep: {ends}."
    svg = plots.plot(label, lambda width: plots.lines(width, lines, timesteps, title, log=log))
    columns = zip(timesteps, *values.values(), strict=True)
    rows = [[str(timestep), *map(figures, errors)] for timestep, *errors in columns]
    return [svg, Table("All values", ["Timestep", *(line.name for line in lines)], rows)]


def _heat(evidence: Evidence, tables: Mapping[str, ErrorTable], what: str, noun: str) -> Parts:
    named = {evidence.models[key].name: each for key, each in tables.items() if each.error.size}
    if not named:
        return []
    worst = [_worst(name, table, noun) for name, table in named.items()]
    tops = [f"{table.label}: {', '.join(map(str, table.rows[0]))}" for table in worst if table.rows]
    label = f"{what} by timestep. {'; '.join(tops)}."
    return [plots.plot(label, lambda width: plots.heat_maps(width, named, what)), *worst]


def _worst(model: str, table: ErrorTable, noun: str) -> Table:
    """The rows with the largest errors, each with the timestep of its largest."""
    rows = [(name, str(t), figures(error)) for name, t, error in table.largest()[:_WORST]]
    return Table(f"Largest errors of {model}", (noun, "Timestep", "Error"), rows)


def bits(evidence: Evidence) -> Parts:
    """How many layers have which bits and run by which kernel, and all layers of each model."""
    models = {key: model.bits for key, model in evidence.others.items() if model.bits}
    every = list(chain.from_iterable(models.values()))
    kinds = [*map(_width, every), *(f"run by {layer.kernel}" for layer in every if layer.kernel)]
    rows = {kind: kind for kind in (*kinds, _AVERAGE)}
    tables = [_all_layers(evidence.models[key].name, layers) for key, layers in models.items()]
    return [_beside(evidence, "Bits", rows, models, _share), *tables] if models else []


def _width(layer: LayerBits) -> str:
    """W4A8, W8 with inputs in float, or in float"""
    if layer.weights >= _FLOAT_BITS:
        return "in float"
    floating = layer.inputs >= _FLOAT_BITS
    return f"W{layer.weights:g}{' with inputs in float' if floating else f'A{layer.inputs:g}'}"


def _share(layers: Sequence[LayerBits], kind: str) -> Cell:
    total = sum(layer.parameters for layer in layers) or 1
    if kind == _AVERAGE:
        return Cell(figures(sum(layer.weights * layer.parameters for layer in layers) / total))
    chosen = [layer for layer in layers if kind in (_width(layer), f"run by {layer.kernel}")]
    share = sum(layer.parameters for layer in chosen) / total
    if not chosen:
        return Cell()
    return Cell(counted(len(chosen), "layer"), f"{percent(share)} of weights", bar=(0, share))


def _all_layers(name: str, layers: Iterable[LayerBits]) -> Table:
    heads = ("Layer", "Weights", "Inputs", "Parameters", "Kernel")
    numbers = "{0.name}|{0.weights:g}|{0.inputs:g}|{0.parameters:,}"
    rows = [[*numbers.format(layer).split("|"), layer.kernel or Cell()] for layer in layers]
    return Table(f"All layers of {name}", heads, rows)


def time(evidence: Evidence) -> Parts:
    """The duration of each stage of each model; `_ALL` has all of them."""
    models = {key: model.stages for key, model in evidence.others.items() if model.stages}
    totals = {key: stages | {_ALL: sum(stages.values())} for key, stages in models.items()}
    names = dict.fromkeys(chain.from_iterable(models.values()))
    rows = {name: name for name in (*names, _ALL)}
    return [_beside(evidence, "Stage", rows, totals, _duration)] if totals else []


def _duration(stages: Mapping[str, float], name: str) -> Cell:
    if name == _ALL:
        return Cell(lasting(stages[_ALL]), strong=True)
    share = stages.get(name, 0.0) / (stages[_ALL] or 1)
    return Cell(lasting(stages[name]), percent(share), bar=(0, share)) if share else Cell()


def predicted(evidence: Evidence) -> Parts:
    """What the run came to, and below it what `lowtide plan` said before the run."""
    models = {key: model for key, model in evidence.others.items() if model.predicted}
    return [_beside(evidence, "Cost", _PREDICTED, models, _outcome)] if models else []


def _outcome(model: Model, cost: str) -> Cell:
    predicted = (model.predicted or {}).get(cost)
    real = (model.real or {}).get(cost)
    if not predicted or not real:
        return Cell()
    write = (lambda minutes: lasting(60 * minutes)) if cost == "minutes" else size
    return Cell(write(real), f"{figures(real / predicted)}× of {write(predicted)} predicted")


def left(evidence: Evidence) -> Parts:
    """The layers in float: how many for each reason, and each by itself."""
    models = {key: model.left for key, model in evidence.others.items() if model.left}
    reasons = dict(ChainMap(*models.values()))
    rows = {why: Cell(why, _parts(reasons, why)) for why in reasons.values()}
    counts = {key: Counter(left.values()) for key, left in models.items()}
    names = Table("All layers left in float", ("Layer", "Reason"), list(reasons.items()))
    table = _beside(evidence, "Reason", rows, counts, lambda has, why: counted(has[why], "layer"))
    return [table, names] if models else []


def _parts(reasons: Mapping[str, str], why: str) -> str:
    """The parts of the network that are left in float for this reason."""
    return ", ".join(dict.fromkeys(part_name(name) for name in reasons if reasons[name] == why))


def drawn(evidence: Evidence) -> dict[str, Parts]:
    """The parts of each section, by its name."""
    sections = (metrics, trajectory, layers, temporal, bits, time, predicted, left)
    return {section.__name__: section(evidence) for section in sections}
