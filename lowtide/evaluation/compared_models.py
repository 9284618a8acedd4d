"""Subjects: the models of a comparison, loaded, named, and checked for being comparable at all."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from lowtide import sampling
from lowtide.checkpoint import facts, quantized_pipeline
from lowtide.checkpoint.provenance import NAME, Record, read
from lowtide.errors import BadInput
from lowtide.nn.plan import Plan
from lowtide.report.text import optional

Source = str | Path | Any
FLOAT, OURS, PEER = "float", "lowtide", "peer"
# What must agree for the same noise to mean the same image.
SHARED = ("sample_size", "in_channels", "num_class_embeds")


@dataclass(frozen=True)
class Subject:
    """One model: where it came from, its pipeline, and the record beside its weights. `key` names its images' folder."""

    source: str
    pipe: Any
    folder: Path | None = None
    record: Record | None = None
    name: str = ""
    key: str = ""

    @cached_property
    def model(self) -> nn.Module:
        return sampling.denoiser(self.pipe)

    @cached_property
    def plan(self) -> Plan:
        return facts.packed_plan(self.model)

    @cached_property
    def kind(self) -> str:
        """Float, ours, or quantized by somebody else."""
        if self.plan.summary:
            return OURS
        return PEER if getattr(self.model, "is_quantized", False) else FLOAT

    @property
    def bytes(self) -> int:
        """The denoiser's weights on disk; in memory for a model that no folder here holds."""
        return (self.folder and facts.on_disk(self.folder)) or facts.parameter_bytes(self.model)


def load(source: Source) -> Subject:
    """A model by zoo:NAME, folder or hub id; or a pipeline (or lowtide.Quantized) that is loaded already."""
    if isinstance(source, str | Path):
        folder = sampling.local_folder(source)
        found = Subject(str(source), sampling.load_pipeline(source), folder, read(folder))
    else:
        pipe = source.pipe if isinstance(source, quantized_pipeline.Quantized) else source
        found = Subject(f"a {type(pipe).__name__} in memory", pipe)
    found.model.requires_grad_(False).eval()
    return replace(found, name=titled(found))


def titled(subject: Subject) -> str:
    """tfmq W4A8; digits; quanto (the folder)."""
    short = Path(subject.source.removeprefix("zoo:")).name
    if subject.kind == FLOAT:
        return f"{short} in float"
    if subject.kind == PEER:
        config = subject.model.config.get("quantization_config") or {}
        method = config.get("quant_method", "") if isinstance(config, dict) else config.quant_method
        return f"{getattr(method, 'value', method) or 'quantized'}, {short}"
    bits = subject.plan.summary
    without = "".join(f" -{name}" for name in subject.record.without) if subject.record else ""
    options = (
        "".join(f" {option}" for option in optional(subject.record.settings.get("stages", {})))
        if subject.record
        else ""
    )
    return f"{subject.plan.method}{without}{options} W{bits['weights']}A{bits['inputs']}"


def distinct(subjects: Sequence[Subject]) -> list[Subject]:
    """The same subjects, each with a name and a key of its own."""
    names = [subject.name for subject in subjects]
    found: list[Subject] = []
    for subject in subjects:
        name = (
            subject.name
            if names.count(subject.name) == 1
            else f"{subject.name}, {Path(subject.source).name}"
        )
        taken = {each.key for each in found}
        keys = (slug(name) + (f"-{number}" if number else "") for number in range(len(subjects)))
        found.append(replace(subject, name=name, key=next(key for key in keys if key not in taken)))
    return found


def slug(name: str) -> str:
    """A name as a folder can have it: letters, digits and single dashes."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower())) or "model"


def reference_of(subject: Subject, reference: Source | None) -> Subject:
    """The float model to compare with: the one that is given, or the one that was quantized."""
    if reference is not None:
        return load(reference)
    if subject.record is None:
        raise BadInput(
            f"found no {NAME} in {subject.source}",
            "a record of the float model",
            "give it with --reference MODEL",
        )
    original = load(subject.record.source)
    if facts.fingerprint(original.model) != subject.record.fingerprint:
        raise BadInput(
            f"found other weights in {subject.record.source} than those that were quantized",
            f"weights with the hash {subject.record.fingerprint}",
            "give them with --reference MODEL, or quantize again",
        )
    return original


def check_alike(subjects: Sequence[Subject]) -> None:
    """One kind of pipeline, scheduler and sample, or the same seed is not the same image."""
    first, *others = subjects
    for other in others:
        for mine, theirs in zip(traits(first), traits(other), strict=True):
            if mine != theirs:
                raise BadInput(
                    f"found {theirs} in {other.source} and {mine} in {first.source}",
                    "models that draw the same from one seed",
                    "compare models of one pipeline, scheduler and size",
                )


def traits(subject: Subject) -> list[str]:
    config = getattr(subject.model, "config", {})
    kinds = [type(subject.pipe).__name__, type(subject.pipe.scheduler).__name__]
    return kinds + [f"{name.replace('_', ' ')} {config.get(name)}" for name in SHARED]
