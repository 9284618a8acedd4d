"""Assign: the formats of each layer and attention, by profile, and what stays in float and why."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from lowtide.costs import Cost, Workload
from lowtide.errors import BadInput
from lowtide.formats import Affine, OwnRange
from lowtide.models import Adapter
from lowtide.nn.plan import LayerPlan
from lowtide.nn.quantizer import input_format
from lowtide.nn.swap import quantize_modules
from lowtide.settings import Settings
from lowtide.stages.base import Job, Stage
from lowtide.stages.kept_layers import REASON as KEPT
from lowtide.stages.kept_layers import kept_in_float
from lowtide.stages.profiles import ENDS, WORDS, Bits, check_parts, parts_of_layers

# An error in the sample or in the answer stays on the sampling path, and the network cannot correct
# a value that is clipped there (decision 0008).
ENDS_IN_FLOAT = "the sample and the answer are not rounded"
OPERANDS = ("q", "k", "v")


@dataclass(frozen=True)
class Assign(Stage):
    """Choose the formats and swap in quantized layers.

    stages/profiles.py says what each profile quantizes. Settings for the first and the last layer,
    the temporal block and the softmax replace the profile's bits.

    per_step: every input gets one range per timestep.
    own_ranges: inputs of layers are rounded to the range of their own values as the network runs,
        by token in a linear layer and by sample in a convolution. Those of attention are not.
    """

    essential: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset(
        {"weights", "inputs", "group", "profile", "ends", "end_inputs", "softmax"}
        | {"temporal", "temporal_inputs", "keep_float"}
    )

    per_step: bool = False
    own_ranges: bool = False

    def check(self, settings: Settings) -> None:
        if self.own_ranges and settings.inputs > 8:
            raise BadInput(
                f"found own_ranges with inputs of {settings.inputs} bits, which are in float",
                "inputs of 1 to 8 bits",
                "leave one of them out",
            )

    def check_model(self, adapter: Adapter, settings: Settings) -> None:
        check_parts(adapter, settings)
        kept_in_float(settings.keep_float, _quantizable(adapter))

    def run(self, job: Job) -> None:
        bits = Bits(job.settings, job.role)
        layers, left = layer_plans(job.adapter, bits)
        kept = kept_in_float(job.settings.keep_float, _quantizable(job.adapter))
        unlike = dict.fromkeys(kept, KEPT) | other_padding(job.adapter.layers())
        layers |= {name: LayerPlan(None, None) for name in unlike if name in layers}
        attentions = _attention_plans(job.adapter, bits, per_step=self.per_step)
        layers = {name: replace(layer, per_step=self.per_step) for name, layer in layers.items()}
        if self.own_ranges:
            modules = job.adapter.layers()
            layers = {name: with_own_range(plan, modules[name]) for name, plan in layers.items()}
        job.plan = replace(
            job.plan,
            layers={name: layer for name, layer in layers.items() if layer.weight or layer.input},
            attentions={name: parts for name, parts in attentions.items() if name not in kept},
            timesteps=tuple(dict.fromkeys(call.timestep for call in job.calls)),
            times=_exact_times(job),
            ticks=job.adapter.ticks,
            method=job.method,
            left=_without_inputs(left, unlike)
            | unlike
            | uncalled(job.adapter)
            | other_parameters(job.model),
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


def _quantizable(adapter: Adapter) -> list[str]:
    """The layers and the attentions by name."""
    return [*adapter.layers(), *adapter.attentions()]


def _exact_times(job: Job) -> tuple[float, ...]:
    """The timesteps as the denoiser reads them, in the order of their rounded keys."""
    times: dict[int, float] = {}
    for call in job.calls:
        times.setdefault(call.timestep, float(call.arguments["timestep"].flatten()[0]))
    return tuple(times.values())


def with_own_range(plan: LayerPlan, layer: nn.Module) -> LayerPlan:
    """The plan of a layer whose input has the range of its own values; a float input stays."""
    if plan.input is None:
        return plan
    assert isinstance(plan.input.bits, int)
    axes = 3 if isinstance(layer, nn.Conv2d) else 1
    return replace(plan, input=OwnRange(plan.input.bits, axes=axes), per_step=False)


def weight_format(bits: int, group: int | None) -> Affine | None:
    """The format of a weight; None, which is float, above 8 bits.

    It is symmetric at 8 bits, at 1 bit and in groups, so that codes fit an int8. Else it is
    asymmetric, because the two sides of a channel's range differ.
    """
    if bits > 8:
        return None
    signed = bits in (1, 8) or group is not None
    return Affine(bits, signed=signed, axis=0, group=group)


def layer_plans(adapter: Adapter, bits: Bits) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """The plan of each layer, and what the profile leaves in float, with the reason."""
    layers: dict[str, LayerPlan] = {}
    left: dict[str, str] = {}
    settings = bits.settings
    for name, part in parts_of_layers(adapter).items():
        group = None if part in ENDS else settings.group
        plan = LayerPlan(weight_format(bits.weight(part), group), input_format(bits.input(part)))
        layers[name] = plan
        reason = f"{WORDS[part]} (profile {settings.profile})"
        if plan.weight is None and settings.weights <= 8:
            left[name] = reason
        elif plan.input is None and settings.inputs <= 8:
            is_end = part in ENDS and settings.profile == "full"
            left[f"input of {name}"] = ENDS_IN_FLOAT if is_end else reason
    if bits.qkv > 8 >= settings.inputs and bits.softmax > 8 and adapter.attentions():
        left["attention"] = f"q, k, v and softmax stay in float (profile {settings.profile})"
    return layers, left


def _attention_plans(
    adapter: Adapter, bits: Bits, *, per_step: bool
) -> dict[str, dict[str, LayerPlan]]:
    operand = LayerPlan(None, input_format(bits.qkv), per_step=per_step)
    softmax = LayerPlan(None, input_format(bits.softmax), per_step=per_step)
    if operand.input is None and softmax.input is None:
        return {}
    parts = dict.fromkeys(OPERANDS, operand) | {"softmax": softmax}
    return {name: dict(parts) for name in adapter.attentions()}


def other_padding(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Convolutions whose padding is not a number of zeros, which no packed layer has."""
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Conv2d):
            continue
        if layer.padding_mode != "zeros":
            reasons[name] = f"its padding is of kind {layer.padding_mode}"
        elif isinstance(layer.padding, str):
            reasons[name] = f"its padding is {layer.padding!r}"
    return reasons


def _without_inputs(left: dict[str, str], float_layers: Container[str]) -> dict[str, str]:
    """The reasons, without those of inputs of layers that are in float as a whole."""
    return {
        name: reason
        for name, reason in left.items()
        if name.removeprefix("input of ") not in float_layers
    }


def uncalled(adapter: Adapter) -> dict[str, str]:
    return dict.fromkeys(adapter.uncalled(), "never called in a forward pass")


def other_parameters(model: nn.Module) -> dict[str, str]:
    """Modules with parameters that are neither Linear nor Conv2d: norms, embeddings, tables."""
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        own = list(module.named_parameters(recurse=False))
        if own and not isinstance(module, nn.Linear | nn.Conv2d):
            kinds[name] = type(module).__name__
    return {name: f"{kind}, not a matrix product" for name, kind in kinds.items()}
