"""Quantized: a pipeline with a packed denoiser, and how it is saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from lowtide import sampling
from lowtide.checkpoint import adapters, folders
from lowtide.distributed.world import join
from lowtide.errors import BadInput
from lowtide.nn.plan import Plan
from lowtide.report.wording import counted, size
from lowtide.sampling.pipelines import Pipeline


@dataclass(repr=False)
class Quantized:
    """A pipeline with a packed denoiser, its plan, and the report of the run that made it."""

    pipe: Pipeline
    plan: Plan
    report: dict[str, Any]

    def __repr__(self) -> str:
        """Quantized(DDIMPipeline, tfmq W4A8, 64 layers, 0.612 MB)"""
        facts = [type(self.pipe).__name__]
        if bits := self.plan.summary:
            facts.append(f"{self.plan.method} W{bits['weights']}A{bits['inputs']}")
        facts.append(counted(len(self.plan.layers), "layer"))
        if account := self.report.get("account"):
            facts.append(size(account["total"]))
        return f"Quantized({', '.join(facts)})"

    @property
    def model(self) -> nn.Module:
        return sampling.denoiser(self.pipe)

    def save(self, folder: str | Path) -> Path:
        """Write an ordinary diffusers folder, whole or not at all.

        An older model in its place is replaced if lowtide wrote it and it holds no other files.
        Of the processes of torchrun, which all call this, the first one writes.
        """
        self._check_saveable()
        with join().inside(folders.written_beside(Path(folder))) as fresh:
            if fresh is not None:
                self.write(fresh)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write the files of the diffusers folder into a folder that exists."""
        self._check_saveable()
        with sampling.quiet_libraries():
            cast(DiffusionPipeline, self.pipe).save_pretrained(folder)

    def _check_saveable(self) -> None:
        adapters.check_saveable(self.pipe)
        if isinstance(self.pipe, sampling.ModulePipeline):
            raise BadInput(
                f"found a {type(self.model).__name__}, which diffusers cannot load",
                "a diffusers model",
                "keep `.model`, or make it a ModelMixin with a config and quantize that",
            )


def save(model: Quantized | DiffusionPipeline, folder: str | Path) -> Path:
    """Write a pipeline, float or packed, as an ordinary diffusers folder, whole or not at all.

    An older model in its place is replaced if lowtide wrote it and it holds no other files.

    Args:
        model: what `quantize` or `reschedule` returned, or a pipeline.
        folder: where it goes.

    Returns:
        The folder.

    Examples:
        >>> import lowtide, tempfile
        >>> place = tempfile.mkdtemp()
        >>> lowtide.save(lowtide.load("zoo:digits"), f"{place}/digits").name
        'digits'
    """
    if isinstance(model, Quantized):
        return model.save(folder)
    return Quantized(cast(Pipeline, model), Plan(), {}).save(folder)
