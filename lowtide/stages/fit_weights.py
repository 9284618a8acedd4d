"""FitWeights: search each weight's range and round to nearest; where every method starts from."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowtide.costs import FLOAT, Cost, Workload
from lowtide.costs.workload import MINMAX_PASSES
from lowtide.formats import SEARCHES, check_search
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.swap import quant_layers
from lowtide.stages.base import Job, Stage


@dataclass(frozen=True)
class FitWeights(Stage):
    """One range per output channel, or per group; `search` chooses it."""

    essential: ClassVar[bool] = True

    search: str = "mse"

    def __post_init__(self) -> None:
        check_search(self.search)

    def run(self, job: Job) -> None:
        layers = _low_bit_layers(job)
        own = job.track(job.world.part(layers), "weight ranges")
        ranges = job.world.gathered([_range_in_place(job, layer, self.search) for layer in own])
        for layer, (lo, hi) in zip(layers, ranges, strict=True):
            with job.placement.visit(layer):
                _set_range(layer, lo, hi)
            layer.set_precision(Precision.FLOAT)

    def cost(self, load: Workload) -> Cost:
        """Every weight is searched, or its minimum and maximum are read."""
        whole = load.network.whole
        each = load.speed.search if self.search == "mse" else MINMAX_PASSES * load.speed.value
        return Cost(whole.weights * each, 4 * FLOAT * whole.largest)

    def summary(self, job: Job) -> str:
        return f"weights of {len(_low_bit_layers(job))} layers rounded to nearest"


def _low_bit_layers(job: Job) -> list[QuantizedLayer]:
    """The layers whose weights are quantized."""
    return [layer for _, layer in quant_layers(job.model) if layer.format is not None]


def fit_weight(layer: QuantizedLayer, search: str) -> None:
    """Search the ranges of one weight, and round it to nearest."""
    _set_range(layer, *_weight_range(layer, search))


def _range_in_place(job: Job, layer: QuantizedLayer, search: str) -> tuple[Tensor, Tensor]:
    with job.placement.visit(layer):
        return _weight_range(layer, search)


def _weight_range(layer: QuantizedLayer, search: str) -> tuple[Tensor, Tensor]:
    """lo and hi of each row of the format, on the CPU."""
    form = layer.format
    assert form is not None
    lo, hi = SEARCHES[search](form.rows(layer.smoothed_weight()), form)
    return lo.cpu(), hi.cpu()


def _set_range(layer: QuantizedLayer, lo: Tensor, hi: Tensor) -> None:
    form = layer.format
    assert form is not None
    device = layer.weight.device
    layer.set_grid(form.params(lo.to(device), hi.to(device), layer.weight.shape[0]))
