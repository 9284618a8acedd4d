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
from lowtide.stages.timed_parts import Bounds, bounds_of_each


@dataclass(frozen=True)
class FitWeights(Stage):
    """One range per output channel, or per group; `search` chooses it."""

    essential: ClassVar[bool] = True

    search: str = "mse"

    def __post_init__(self) -> None:
        check_search(self.search)

    def run(self, job: Job) -> None:
        layers = _low_bit_layers(job)

        def search(name: str) -> Bounds:
            with job.placement.visit(layers[name]):
                return _weight_range(layers[name], self.search)

        own = job.track(job.world.part(list(layers)), "weight ranges")
        found = bounds_of_each(job, "FitWeights", own, search)
        for name, (lo, hi) in job.world.gathered(list(found.items())):
            layer = layers[name]
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


def _low_bit_layers(job: Job) -> dict[str, QuantizedLayer]:
    """The layers whose weights are quantized, by name."""
    return {name: layer for name, layer in quant_layers(job.model) if layer.format is not None}


def fit_weight(layer: QuantizedLayer, search: str) -> None:
    """Search the ranges of one weight, and round it to nearest."""
    _set_range(layer, *_weight_range(layer, search))


def _weight_range(layer: QuantizedLayer, search: str) -> Bounds:
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
