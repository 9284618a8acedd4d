"""Assign: which formats each layer and each attention gets, by profile; what stays in float is named, never silent."""

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
# The sample that a sampler hands in and the answer it takes: an error there stays on the path, and what is clipped there
# the network cannot see, hence not mend (decision 0008).
ENDS = "the sample and the answer are not rounded"
ATTENTION_PARTS = ("q", "k", "v", "softmax")


@dataclass(frozen=True)
class Assign(Stage):
    """Swap in quantized layers. `full`: everything, but of the first and the last layer the weights alone, at 8 bits;
    `paper`: what the papers' code quantizes.

    per_step gives every input one range per timestep.
    """

    essential: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"weights", "inputs", "group", "profile"})

    per_step: bool = False

    def run(self, job: Job) -> None:
        timesteps = tuple(dict.fromkeys(call.timestep for call in job.calls))
        layers, left = full_profile(job.adapter, job.settings)
        if job.settings.profile == "paper":
            layers, left = paper_profile(job.adapter, layers)
        layers = {name: replace(layer, per_step=self.per_step) for name, layer in layers.items()}
        job.plan = replace(
            job.plan,
            layers={name: layer for name, layer in layers.items() if layer.weight or layer.input},
            attentions={}
            if job.settings.profile == "paper"
            else attention_plans(job, self.per_step),
            timesteps=timesteps,
            times=exact_times(job),
            ticks=job.adapter.ticks,
            method=job.method,
            left=left | uncalled(job.adapter) | other_parameters(job.model),
        )
        quantize_modules(job.model, job.plan)

    def cost(self, load: Workload) -> Cost:
        """Next to nothing."""
        return Cost()

    def foresee(self, job: Job) -> None:
        """The plan depends on shapes alone."""
        self.run(job)


def exact_times(job: Job) -> tuple[float, ...]:
    """The timesteps as the denoiser heard them, in the order of their rounded keys."""
    heard = {
        call.timestep: float(call.arguments["timestep"].flatten()[0])
        for call in reversed(job.calls)
    }
    return tuple(heard[timestep] for timestep in dict.fromkeys(call.timestep for call in job.calls))


def weight_format(bits: int, group: int | None) -> Affine | None:
    """Eight bits, one bit and groups are symmetric, so that codes fit an int8; the rest bend to lopsided channels."""
    if bits > 8:
        return None
    return Affine(bits, bits in (1, 8) or group is not None, 0, group)


def full_profile(
    adapter: Adapter, settings: Settings
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    inner = LayerPlan(
        weight_format(settings.weights, settings.group), input_format(settings.inputs)
    )
    end = LayerPlan(inner.weight and weight_format(END_BITS, None), None)
    ends = adapter.ends()
    left = {f"input of {name}": ENDS for name in ends if inner.input}
    return {name: end if name in ends else inner for name in adapter.layers()}, left


def paper_profile(
    adapter: Adapter, layers: dict[str, LayerPlan]
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """The released code's choices: ends, shortcuts, downsampling and the first temporal layer in float, two inputs in float."""
    reasons = dict.fromkeys(adapter.ends(), "first or last layer")
    reasons |= dict.fromkeys(
        [*adapter.shortcuts(), *adapter.downsamplers()], "shortcut or downsampling"
    )
    temporal = [name for unit in adapter.temporal() for name in unit.layers]
    reasons |= dict.fromkeys(temporal[:1], "first temporal layer")
    first_inner = next(name for unit in adapter.blocks() for name in unit.layers)
    floating = [name for name in (*temporal[1:2], first_inner) if name not in reasons]
    layers = layers | {name: LayerPlan(None, None) for name in reasons}
    layers |= {name: replace(layers[name], input=None) for name in floating}
    left = {name: f"{why} (paper profile)" for name, why in reasons.items()}
    left |= {f"input of {name}": "near the input (paper profile)" for name in floating}
    return layers, left | {
        "attention": "q, k, v and softmax stay in float in the released code (paper profile)"
    }


def attention_plans(job: Job, per_step: bool) -> dict[str, dict[str, LayerPlan]]:
    part = LayerPlan(None, input_format(job.settings.inputs), per_step)
    if part.input is None:
        return {}
    return {name: dict.fromkeys(ATTENTION_PARTS, part) for name in job.adapter.attentions()}


def uncalled(adapter: Adapter) -> dict[str, str]:
    return dict.fromkeys(adapter.uncalled(), "never called in a forward pass")


def other_parameters(model: nn.Module) -> dict[str, str]:
    """Norms, embeddings, tables: what is neither a Linear nor a Conv2d."""
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        own = list(module.named_parameters(recurse=False))
        if own and not isinstance(module, nn.Linear | nn.Conv2d):
            kinds[name] = type(module).__name__
    return {name: f"{kind}, not a matrix product" for name, kind in kinds.items()}
