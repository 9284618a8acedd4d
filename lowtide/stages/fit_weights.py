"""FitWeights: search each weight's range and round to nearest; where every method starts from."""

from dataclasses import dataclass
from typing import ClassVar

from lowtide.costs import FLOAT, Cost, Workload
from lowtide.costs.workload import WATCH
from lowtide.formats import SEARCHES, check_search
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.swap import quant_layers
from lowtide.stages.base import Job, Stage


@dataclass(frozen=True)
class FitWeights(Stage):
    """One range per output channel (or group), found by `search`."""

    essential: ClassVar[bool] = True

    search: str = "mse"

    def __post_init__(self) -> None:
        check_search(self.search)

    def run(self, job: Job) -> None:
        layers = [layer for _, layer in quant_layers(job.model) if layer.format is not None]
        for layer in job.track(layers, "weight ranges"):
            fit_weight(layer, self.search)
            layer.set_precision(Precision.FLOAT)

    def cost(self, load: Workload) -> Cost:
        """Every weight is searched, or its ends are read."""
        whole = load.network.whole
        each = load.speed.search if self.search == "mse" else WATCH * load.speed.value
        return Cost(whole.weights * each, 4 * FLOAT * whole.largest)


def fit_weight(layer: QuantizedLayer, search: str) -> None:
    weight, format = layer.whole_weight(), layer.format
    lo, hi = SEARCHES[search](format.rows(weight), format)
    layer.set_grid(format.params(lo, hi, weight.shape[0]))
