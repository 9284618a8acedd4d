"""FitWeights: search each weight's range and round to nearest; where every method starts from."""

from dataclasses import dataclass
from typing import ClassVar

from lowtide.formats import SEARCHES, check_search
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.swap import quant_layers
from lowtide.stages.base import Job


@dataclass(frozen=True)
class FitWeights:
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


def fit_weight(layer: QuantizedLayer, search: str) -> None:
    weight, format = layer.whole_weight(), layer.format
    lo, hi = SEARCHES[search](format.rows(weight), format)
    layer.set_grid(format.params(lo, hi, weight.shape[0]))
