"""Assign: the formats of each layer and attention, by profile, and what stays in float and why."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from lowtide.costs import Cost, Workload
from lowtide.formats import Affine
from lowtide.models import Adapter
from lowtide.nn.plan import LayerPlan
from lowtide.nn.quantizer import input_format
from lowtide.nn.swap import quantize_modules
from lowtide.settings import Settings
from lowtide.stages.base import Job, Stage

END_BITS = 8
# An error in the sample or in the answer stays on the sampling path, and the network cannot correct
# a value that is clipped there (decision 0008).
ENDS = "the sample and the answer are not rounded"
ATTENTION_PARTS = ("q", "k", "v", "softmax")


@dataclass(frozen=True)
class Assign(Stage):
    """Choose the formats and swap in quantized layers.

    Profile `full` quantizes everything; of the first and the last layer it quantizes the weights
    alone, at 8 bits. Profile `paper` quantizes what the papers' code quantizes.

    per_step: every input gets one range per timestep.
    """

    essential: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"weights", "inputs", "group", "profile"})

    per_step: bool = False

    def run(self, job: Job) -> None:
        paper = job.settings.profile == "paper"
        layers, left = _full_profile(job.adapter, job.settings)
        if paper:
            layers, left = _paper_profile(job.adapter, layers)
        unlike = _other_padding(job.adapter)
        layers |= {name: LayerPlan(None, None) for name in unlike}
        layers = {name: replace(layer, per_step=self.per_step) for name, layer in layers.items()}
        job.plan = replace(
            job.plan,
            layers={name: layer for name, layer in layers.items() if layer.weight or layer.input},
            attentions={} if paper else _attention_plans(job, per_step=self.per_step),
            timesteps=tuple(dict.fromkeys(call.timestep for call in job.calls)),
            times=_exact_times(job),
            ticks=job.adapter.ticks,
            method=job.method,
            left=left | unlike | _uncalled(job.adapter) | _other_parameters(job.model),
        )
        quantize_modules(job.model, job.plan)

    def cost(self, load: Workload) -> Cost:
        """Next to nothing."""
        return Cost()

    def predict_plan(self, job: Job) -> None:
        """The plan depends on shapes alone."""
        self.run(job)

    def summary(self, job: Job) -> str:
        return f"formats chosen for {len(job.plan.layers)} layers"


def _exact_times(job: Job) -> tuple[float, ...]:
    """The timesteps as the denoiser reads them, in the order of their rounded keys."""
    times: dict[int, float] = {}
    for call in job.calls:
        times.setdefault(call.timestep, float(call.arguments["timestep"].flatten()[0]))
    return tuple(times.values())


def weight_format(bits: int, group: int | None) -> Affine | None:
    """The format of a weight; None, which is float, above 8 bits.

    It is symmetric at 8 bits, at 1 bit and in groups, so that codes fit an int8. Else it is
    asymmetric, because the two sides of a channel's range differ.
    """
    if bits > 8:
        return None
    signed = bits in (1, 8) or group is not None
    return Affine(bits, signed=signed, axis=0, group=group)


def _full_profile(
    adapter: Adapter, settings: Settings
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """The plan of each layer, and what stays in float, with the reason."""
    weight = weight_format(settings.weights, settings.group)
    inner = LayerPlan(weight, input_format(settings.inputs))
    end = LayerPlan(weight and weight_format(END_BITS, None), None)
    ends = adapter.ends()
    left = {f"input of {name}": ENDS for name in ends if inner.input}
    return {name: end if name in ends else inner for name in adapter.layers()}, left


def _paper_profile(
    adapter: Adapter, layers: dict[str, LayerPlan]
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """The choices of the released code.

    In float are: first and last layer, shortcuts, downsampling, the first temporal layer, and the
    inputs of two more layers.
    """
    reasons = dict.fromkeys(adapter.ends(), "first or last layer")
    resampling = [*adapter.shortcuts(), *adapter.downsamplers()]
    reasons |= dict.fromkeys(resampling, "shortcut or downsampling")
    temporal: list[str] = []
    for unit in adapter.temporal():
        temporal += unit.layers
    reasons |= dict.fromkeys(temporal[:1], "first temporal layer")
    first_inner = adapter.blocks()[0].layers[0]
    float_inputs = [name for name in (*temporal[1:2], first_inner) if name not in reasons]
    layers = layers | {name: LayerPlan(None, None) for name in reasons}
    layers |= {name: replace(layers[name], input=None) for name in float_inputs}
    left = {name: f"{reason} (paper profile)" for name, reason in reasons.items()}
    left |= {f"input of {name}": "near the input (paper profile)" for name in float_inputs}
    left["attention"] = "q, k, v and softmax stay in float in the released code (paper profile)"
    return layers, left


def _attention_plans(job: Job, *, per_step: bool) -> dict[str, dict[str, LayerPlan]]:
    part = LayerPlan(None, input_format(job.settings.inputs), per_step=per_step)
    if part.input is None:
        return {}
    return {name: dict.fromkeys(ATTENTION_PARTS, part) for name in job.adapter.attentions()}


def _other_padding(adapter: Adapter) -> dict[str, str]:
    """Convolutions whose padding is not a number of zeros, which no packed layer has."""
    reasons: dict[str, str] = {}
    for name, layer in adapter.layers().items():
        if not isinstance(layer, nn.Conv2d):
            continue
        if layer.padding_mode != "zeros":
            reasons[name] = f"its padding is of kind {layer.padding_mode}"
        elif isinstance(layer.padding, str):
            reasons[name] = f"its padding is {layer.padding!r}"
    return reasons


def _uncalled(adapter: Adapter) -> dict[str, str]:
    return dict.fromkeys(adapter.uncalled(), "never called in a forward pass")


def _other_parameters(model: nn.Module) -> dict[str, str]:
    """Modules with parameters that are neither Linear nor Conv2d: norms, embeddings, tables."""
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        own = list(module.named_parameters(recurse=False))
        if own and not isinstance(module, nn.Linear | nn.Conv2d):
            kinds[name] = type(module).__name__
    return {name: f"{kind}, not a matrix product" for name, kind in kinds.items()}
