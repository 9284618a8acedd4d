"""Facts of a model, float or packed: units, layers, bits, bytes, kernels, calibrated steps."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from lowtide import runtime, sampling
from lowtide.checkpoint import diffusers_hook, file_format, folders
from lowtide.errors import BadInput
from lowtide.formats import Format
from lowtide.kernels.hashing import hashes
from lowtide.models import Adapter, Unit, adapt
from lowtide.models.described import described_adapter
from lowtide.nn.extension import extends
from lowtide.nn.plan import LayerPlan, Plan
from lowtide.nn.split import split_modules
from lowtide.sampling.call_values import recorded
from lowtide.sampling.pipelines import Pipeline
from lowtide.stages.base import Job

_FLOAT32 = 32


@dataclass(frozen=True)
class UnitFacts:
    """One unit: how many layers and weights it has, and which of the model's inputs it reads."""

    name: str
    kind: str
    layers: int
    reads: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class LayerFacts:
    """One layer: the shape of its weight, and the bits of weight and input.

    `weights` is a tuple if the output channels differ in bits.
    """

    name: str
    shape: tuple[int, ...]
    weights: int | tuple[int, ...]
    inputs: int | tuple[int, ...]
    per_step: bool


@dataclass(frozen=True)
class ModelFacts:
    """A whole model. `left_in_float`: what is not quantized, and why. `account`: bytes by kind.

    `kernels`: what runs each packed layer on this machine, and why.
    """

    model: str
    architecture: str
    parameters: int
    units: tuple[UnitFacts, ...]
    layers: tuple[LayerFacts, ...]
    left_in_float: dict[str, str]
    timesteps: tuple[int, ...]
    account: dict[str, int]
    kernels: dict[str, str]

    def to_json(self) -> dict[str, object]:
        """The fields as `lowtide inspect --json` prints them."""
        return {
            "float" if name == "left_in_float" else name: value
            for name, value in asdict(self).items()
        }


def kernels(model: nn.Module) -> dict[str, str]:
    """The kernel of each packed layer on this machine, and why."""
    return runtime.kernels_of(model)


def float_share(job: Job) -> float:
    """The share of the model's parameters that stays in float; biases do not count."""
    adapter = job.adapter
    coded = [
        math.prod(_weight(adapter, name).shape)
        for name, layer in job.plan.layers.items()
        if layer.weight
    ]
    layers = adapter.all_layers.values()
    biases = sum(module.bias.numel() for module in layers if isinstance(module.bias, Tensor))
    cached = sum(_weight(adapter, name).numel() for name in replaced_layers(job.plan))
    return 1 - sum(coded) / (_parameters(adapter) - biases - cached)


def replaced_layers(plan: Plan) -> list[str]:
    """Temporal layers that a cache replaces."""
    replaced = (
        name for name, cache in plan.cached.items() if not cache.computed and not cache.kept
    )
    return [*replaced, *plan.blank]


def parameter_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def on_disk(folder: Path) -> int:
    """Bytes of the denoiser's weight files."""
    homes = [folder / name for name in sampling.DENOISERS if (folder / name).is_dir()]
    home = homes[0] if homes else folder
    return sum(path.stat().st_size for path in home.glob("*.safetensors"))


def check_steps(model: nn.Module, steps: int) -> None:
    """A model of one schedule alone samples with as many steps as it was calibrated for."""
    plan = packed_plan(model)
    known = plan.summary.get("steps")
    if plan.keyed and steps != known and not extends(plan):
        raise BadInput(
            f"found {steps} steps",
            f"the {known} it was calibrated for",
            f"use --steps {known}, or quantize again without --only-schedule or with "
            f"--steps {steps}",
        )


def calibrated_steps(model: nn.Module) -> int | None:
    """The number of steps that a packed model was quantized for; None for a float model."""
    return cast(int | None, packed_plan(model).summary.get("steps"))


def packed_plan(model: nn.Module) -> Plan:
    """The plan of a packed model; an empty one for a float model or one of another library."""
    quantizer = getattr(model, "hf_quantizer", None)
    ours = isinstance(quantizer, diffusers_hook.LowtideQuantizer)
    return (quantizer.plan or Plan()) if ours else Plan()


def inspect(source: str) -> dict[str, object]:
    """Units, layers, bits and bytes of a model, float or packed, as plain JSON values."""
    return model_facts(source).to_json()


def model_facts(source: str) -> ModelFacts:
    """Units, layers, bits and bytes of a model, float or packed."""
    folders.recover_missing(source)
    model = sampling.denoiser(sampling.load_pipeline(source))
    folder = sampling.local_folder(source)
    plan = packed_plan(model)
    adapter = float_adapter(model, plan)
    account = file_format.account(model) | {"ideal": ideal_bytes(adapter, plan)}
    if folder:
        account["on_disk"] = on_disk(folder)
    return ModelFacts(
        model=source,
        architecture=type(model).__name__,
        parameters=_parameters(adapter),
        units=tuple(_unit_facts(adapter, unit) for unit in adapter.units()),
        layers=tuple(_layer_facts(adapter, name, plan) for name in adapter.layers()),
        left_in_float=plan.left,
        timesteps=plan.timesteps,
        account=account,
        kernels=kernels(model),
    )


def float_adapter(model: nn.Module, plan: Plan) -> Adapter:
    """The architecture of a float or packed model, from the shapes of the float model alone."""
    # Only models of diffusers reach this line, and they are made from their configuration.
    kind = cast(Any, type(model))
    with torch.device("meta"):
        floating = kind.from_config(model.config)
        split_modules(floating, plan.splits)
        return described_adapter(floating, plan.example) if plan.example else adapt(floating)


def _unit_facts(adapter: Adapter, unit: Unit) -> UnitFacts:
    return UnitFacts(
        name=unit.name,
        kind=unit.kind,
        layers=len(unit.layers),
        reads=tuple(unit.reads),
        weights=sum(_weight(adapter, name).numel() for name in unit.layers),
    )


def _layer_facts(adapter: Adapter, name: str, plan: Plan) -> LayerFacts:
    layer = plan.layers.get(name, LayerPlan(None, None))
    return LayerFacts(
        name=name,
        shape=tuple(_weight(adapter, name).shape),
        weights=layer.weight.bits if layer.weight else _FLOAT32,
        inputs=layer.input.bits if layer.input else _FLOAT32,
        per_step=layer.per_step,
    )


def _weight(adapter: Adapter, name: str) -> Tensor:
    return cast(Tensor, adapter.all_layers[name].weight)


def _parameters(adapter: Adapter) -> int:
    """The number of parameters of the float model."""
    return sum(parameter.numel() for parameter in adapter.meta.parameters())


def ideal_bytes(adapter: Adapter, plan: Plan) -> int:
    """Bits times weights, without tables and padding, and four bytes per other parameter."""
    sizes = {name: _weight(adapter, name).numel() for name in adapter.layers()}
    others = _parameters(adapter) - sum(sizes.values())
    gone = replaced_layers(plan)
    formats = {name: layer.weight for name, layer in plan.layers.items()}
    coded = sum(
        size * average_bits(formats.get(name)) / 8
        for name, size in sizes.items()
        if name not in gone
    )
    return round(coded) + 4 * others


def average_bits(form: Format | None) -> float:
    """Bits per weight, the mean over the output channels."""
    if form is None:
        return _FLOAT32
    return sum(form.bits) / len(form.bits) if isinstance(form.bits, tuple) else form.bits


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.blake2b(digest_size=8)
    state = model.state_dict()
    for name, found in zip(state, hashes(list(state.values()), file_format.HASH), strict=True):
        digest.update(f"{name} {found}".encode())
    return digest.hexdigest()


def digest_of_parts(pipe: Pipeline) -> str:
    """A hash of all that calibration calls beside the denoiser, and of every configuration.

    The weights of text encoders and of the decoder, their configurations, the denoiser's, and the
    scheduler's. Tokenizers count by their class and size of vocabulary.
    """
    parts: dict[str, object] = {"scheduler": pipe.scheduler, "denoiser": sampling.denoiser(pipe)}
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(pipe, DiffusionPipeline):
        parts |= pipe.components
    if isinstance(pipe, sampling.ModulePipeline):
        example = {"shape": pipe.shape, **pipe.conditions}
        digest.update(json.dumps(example, default=recorded).encode())
    denoiser = parts["denoiser"]
    for name in sorted(parts):
        part = parts[name]
        config = getattr(part, "config", None)
        vocabulary = getattr(part, "vocab_size", None)
        text = f"{name} {type(part).__name__} {_plain_config(config)} {vocabulary}"
        digest.update(text.encode())
        if isinstance(part, nn.Module) and part is not denoiser:
            digest.update(fingerprint(part).encode())
    return digest.hexdigest()


def _plain_config(config: object) -> str:
    """A configuration as text, without what diffusers notes beside it in names such as _paths.

    These notes hold paths, and lists of names whose order differs between processes.
    """
    to_dict = getattr(config, "to_dict", None)
    values = to_dict() if callable(to_dict) else config
    if not isinstance(values, Mapping):
        return ""
    kept = {str(name): value for name, value in values.items() if not str(name).startswith("_")}
    return json.dumps(kept, sort_keys=True, default=str)
