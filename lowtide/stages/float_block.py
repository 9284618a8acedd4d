"""The float block of a temporal unit, as it stays in the checkpoint to compute features."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from lowtide.formats import Affine
from lowtide.models import Unit
from lowtide.nn.plan import CachePlan, LayerPlan, RequestPlan
from lowtide.nn.quantized import QuantizedLayer, QuantLinear
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.request_features import PerRequest
from lowtide.nn.swap import find_clock, replace_module
from lowtide.stages.assign import weight_format
from lowtide.stages.base import Job
from lowtide.stages.fit_weights import fit_weight
from lowtide.stages.model_edits import forget, request_features

ONCE = "it runs once a request, on inputs in float"


class FloatBlock:
    """Twins of the unit's layers: weights at `bits` bits or in float, and inputs in float.

    Inputs in float need no divisors. Above 8 bits, weights stay in the type of the model.

    alone: no quantized layer stays beside a twin. Else a feature's layer whose weight has 8 bits
        keeps its codes, so that one weight serves both.
    """

    def __init__(self, job: Job, unit: Unit, bits: int, *, alone: bool = False):
        self.job = job
        self.unit = unit
        self.alone = alone
        self.form = weight_format(bits, None)
        self.layers = {name: job.model.get_submodule(name) for name in unit.layers}
        self.twins = {name: self._twin(name, layer) for name, layer in self.layers.items()}

    def _twin(self, name: str, layer: nn.Module) -> nn.Module:
        """The layer of the float block; one that is in float already is its own twin."""
        if not isinstance(layer, QuantLinear):
            return layer
        form = self.form if layer.format else None
        twin = QuantLinear(layer, form, Quantizer(None, find_clock(self.job.model)))
        if form is None:
            return twin
        is_shared = name in self.unit.features and self.shares_codes(layer)
        if is_shared and not self.alone:
            twin.set_smooth(layer.smooth)
            twin.set_grid(layer.grid)
            twin.set_codes(layer.codes)
        else:
            fit_weight(twin, "mse")
        return twin

    def shares_codes(self, layer: nn.Module) -> bool:
        """Whether the layer's own weight is as fine as the block's: equal codes, or float."""
        assert isinstance(layer, QuantizedLayer)
        return layer.format is None or layer.format == self.form

    @contextmanager
    def replacing(self, names: Iterable[str]) -> Iterator[None]:
        """Within the context, the model runs these layers of the float block."""
        names = list(names)
        for name in names:
            replace_module(self.job.model, name, self.twins[name])
        try:
            yield
        finally:
            for name in names:
                replace_module(self.job.model, name, self.layers[name])

    def keep(self, name: str, reason: str = ONCE) -> None:
        """The layer of the float block takes the place of the quantized one."""
        twin = self.twins[name]
        replace_module(self.job.model, name, twin)
        if isinstance(twin, QuantLinear):
            form = self.form if twin.format else None
            smooth = bool(twin.smooth.numel())
            plan_float_block(self.job, name, form, reason, smooth=smooth)

    def beside(self, name: str) -> tuple[nn.Module | None, LayerPlan | None]:
        """The twin that a quantized layer needs beside it, and its formats; None if it has both."""
        twin = self.twins[name]
        if twin is self.layers[name] or self.shares_codes(self.layers[name]):
            return None, None
        assert isinstance(twin, QuantLinear)
        if twin.bias is not None:
            twin.bias = nn.Parameter(twin.bias.clone(), requires_grad=False)  # a file holds both
        return twin, LayerPlan(twin.format, None)

    def put_feature(self, name: str, cache: CachePlan, cached: Tensor) -> None:
        """Let a layer compute its feature once a request; for the cache at the steps `cached`."""
        plan = RequestPlan(self.unit.reads)
        exact = None
        if cached.all():
            self.keep(name)
            plan = replace(plan, cache=cache)
        elif cached.any():
            exact, formats = self.beside(name)
            plan = replace(plan, cache=replace(cache, computed=True), exact=formats)
        layer = self.job.model.get_submodule(name)
        module = PerRequest(name, layer, plan, find_clock(self.job.model), exact)
        if plan.cache is not None and plan.cache.computed:
            module.chosen = cached
        replace_module(self.job.model, name, module)
        request_features(self.job, {name: plan})


def plan_float_block(
    job: Job, name: str, form: Affine | None, reason: str = ONCE, *, smooth: bool = False
) -> None:
    """Plan a layer of the float block; one that was in float stays as it is."""
    if name not in job.plan.layers:
        return
    before = job.plan.layers[name]
    if form is None or before.weight is None:
        forget(job, name)
        job.plan.left[name] = reason
        return
    job.plan.layers[name] = replace(before, weight=form, input=None, smooth=smooth)
    if before.input is not None:
        job.plan.left[f"input of {name}"] = reason
