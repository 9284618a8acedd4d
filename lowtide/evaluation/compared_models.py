"""The models of a comparison: loaded, named, and checked that they can be compared."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from lowtide import sampling
from lowtide.checkpoint import facts, folders, provenance, quantized_pipeline
from lowtide.checkpoint.adapters import settle_adapters
from lowtide.errors import BadInput
from lowtide.machine.device_names import AUTO
from lowtide.machine.devices import chosen
from lowtide.nn.plan import Plan
from lowtide.report.text import optional
from lowtide.sampling.pipelines import Pipeline

ModelSource = str | Path | Pipeline | quantized_pipeline.Quantized
FLOAT = "float"
LOWTIDE = "lowtide"
PEER = "peer"
# Parts of the configuration that must agree, so that one seed gives the same noise to all models.
_SHARED = ("sample_size", "in_channels", "num_class_embeds")


@dataclass(frozen=True)
class ComparedModel:
    """One model: its source, its pipeline, its folder, and the record of its quantization.

    name: for people. key: the name of the folder of its images.
    named: it was loaded from its source; else a program may have changed it in memory.
    """

    source: str
    pipe: Pipeline
    folder: Path | None = None
    record: provenance.Provenance | None = None
    name: str = ""
    key: str = ""
    named: bool = False

    @cached_property
    def denoiser(self) -> nn.Module:
        return sampling.denoiser(self.pipe)

    @cached_property
    def plan(self) -> Plan:
        return facts.packed_plan(self.denoiser)

    @cached_property
    def kind(self) -> str:
        """Float, quantized by lowtide, or quantized by another library (a peer)."""
        if self.plan.summary:
            return LOWTIDE
        return PEER if getattr(self.denoiser, "is_quantized", False) else FLOAT

    @property
    def bytes(self) -> int:
        """The denoiser's weights on disk, or in memory if no local folder has them."""
        on_disk = facts.on_disk(self.folder) if self.folder else 0
        return on_disk or facts.parameter_bytes(self.denoiser)


def load(source: ModelSource, device: str = AUTO) -> ComparedModel:
    """A model from zoo:NAME, a folder or a hub id; or a loaded pipeline or lowtide.Quantized.

    `device` is for a name; what was loaded stays where it is.
    """
    model = _from_source(source, device) if isinstance(source, str | Path) else _in_memory(source)
    model.denoiser.requires_grad_(False).eval()
    return replace(model, name=_title(model))


def _from_source(source: str | Path, device: str) -> ComparedModel:
    place = chosen(device)
    folders.recover_missing(source)
    folder = sampling.local_folder(source)
    record = provenance.read(folder)
    if record is not None:
        _check_record(record, source)
    pipe = sampling.load_pipeline(source, device=place)
    return ComparedModel(str(source), pipe, folder, record, named=True)


def _in_memory(source: Pipeline | quantized_pipeline.Quantized) -> ComparedModel:
    pipe = source.pipe if isinstance(source, quantized_pipeline.Quantized) else source
    return ComparedModel(f"a {type(pipe).__name__} in memory", pipe)


def _check_record(record: provenance.Provenance, source: str | Path) -> None:
    """The parts that a comparison reads have the right types."""
    fits = {
        "source": isinstance(record.source, str),
        "fingerprint": isinstance(record.fingerprint, str),
        "settings": isinstance(record.settings, dict),
        "report": isinstance(record.report, dict),
    }
    if wrong := [name for name, fit in fits.items() if not fit]:
        raise BadInput(
            f"found {provenance.NAME} in {source} with a damaged {wrong[0]!r}",
            "the record that lowtide wrote",
            "delete it, or quantize again",
        )


def _title(model: ComparedModel) -> str:
    """Such as "tfmq W4A8", "digits in float", or "quanto, FOLDER"."""
    short = Path(model.source.removeprefix("zoo:")).name
    if model.kind == FLOAT:
        return f"{short} in float"
    if model.kind == PEER:
        return f"{_peer_method(model.denoiser)}, {short}"
    bits = model.plan.summary
    return f"{model.plan.method}{_variant(model.record)} W{bits['weights']}A{bits['inputs']}"


def _peer_method(denoiser: nn.Module) -> str:
    """The name that diffusers has for the other library's method."""
    config = getattr(denoiser, "config", {}).get("quantization_config") or {}
    method = config.get("quant_method", "") if isinstance(config, dict) else config.quant_method
    return getattr(method, "value", method) or "quantized"


def _variant(record: provenance.Provenance | None) -> str:
    """The stages that were left out and the options of stages."""
    if record is None:
        return ""
    without = "".join(f" -{stage}" for stage in record.without)
    return without + "".join(f" {option}" for option in optional(record.settings.get("stages", {})))


def distinct(models: Sequence[ComparedModel]) -> list[ComparedModel]:
    """The same models, each with a key of its own, and a name that tells it from the others."""
    names = [model.name for model in models]
    named: list[ComparedModel] = []
    for model in models:
        repeated = names.count(model.name) > 1
        name = f"{model.name}, {Path(model.source).name}" if repeated else model.name
        key = _free_key(slug(name), {other.key for other in named})
        named.append(replace(model, name=name, key=key))
    return named


def _free_key(key: str, used: set[str]) -> str:
    """The key, or the key with the first number that makes it new."""
    numbered = (f"{key}-{number}" for number in range(1, len(used) + 1))
    return next(each for each in (key, *numbered) if each not in used)


def slug(name: str) -> str:
    """A name for a folder: letters, digits and single dashes."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower())) or "model"


def reference_of(
    model: ComparedModel, reference: ModelSource | None, device: str = AUTO
) -> ComparedModel:
    """The float model to compare with: `reference`, or the model that was quantized."""
    if reference is not None:
        return load(reference, device)
    if model.record is None or not model.record.source:
        raise BadInput(
            f"found no {provenance.NAME} in {model.source} that names the float model",
            "the float model to compare with",
            "give it with --reference MODEL",
        )
    if is_gone(model.record.source):
        raise BadInput(
            f"found nothing at {model.record.source}, which {model.source} was made of",
            "the float model to compare with",
            "give its new place with --reference MODEL",
        )
    provenance.check_here(model.record.source, model.source, "--reference")
    lora = model.record.settings.get("fuse_lora")
    if isinstance(lora, str):
        provenance.check_here(lora, model.source, "a --reference with the LoRA")
    original = load(model.record.source, device)
    settle_adapters(original.pipe, fuse_lora=model.record.settings.get("fuse_lora", False))
    if facts.fingerprint(original.denoiser) != model.record.fingerprint:
        raise BadInput(
            f"found other weights in {model.record.source} than those that were quantized",
            f"weights with the hash {model.record.fingerprint}",
            "give them with --reference MODEL, or quantize again",
        )
    settle_adapters(original.pipe, fuse_lora=model.record.settings.get("side_lora", False))
    return original


def is_gone(source: str) -> bool:
    """Whether a folder is not there any more; a hub id and zoo:NAME are no folders."""
    return Path(source).is_absolute() and not Path(source).exists()


def sampled_alike(
    models: Sequence[ComparedModel], request: sampling.Request
) -> tuple[list[ComparedModel], sampling.Request]:
    """The models with the sampler of the request, and what else the request says."""
    pipes = [sampling.scheduled(each.pipe, request.scheduler, request.spacing) for each in models]
    alike = [replace(model, pipe=pipe) for model, pipe in zip(models, pipes, strict=True)]
    return alike, replace(request, scheduler=None, spacing=None)


def check_comparable(models: Sequence[ComparedModel]) -> None:
    """All have one kind of pipeline, scheduler and sample, so that a seed is one image."""
    first, *others = models
    for other in others:
        for mine, theirs in zip(_traits(first), _traits(other), strict=True):
            if mine != theirs:
                raise BadInput(
                    f"found {theirs} in {other.source} and {mine} in {first.source}",
                    "models that make the same image from one seed",
                    "compare models of one pipeline, scheduler and size",
                )


def _traits(model: ComparedModel) -> list[str]:
    config = getattr(model.denoiser, "config", {})
    kinds = [type(model.pipe).__name__, type(model.pipe.scheduler).__name__]
    return kinds + [f"{name.replace('_', ' ')} {config.get(name)}" for name in _SHARED]
