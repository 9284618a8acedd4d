"""Quantized: a pipeline with a packed denoiser, and how it is saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lowtide import sampling
from lowtide.checkpoint import folders
from lowtide.errors import BadInput
from lowtide.nn.plan import Plan


@dataclass
class Quantized:
    """A pipeline with a packed denoiser, and what is known of how it got there."""

    pipe: Any
    plan: Plan
    report: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        return sampling.denoiser(self.pipe)

    def save(self, folder: str | Path) -> Path:
        """Write an ordinary diffusers folder, whole or not at all."""
        if isinstance(self.pipe, sampling.ModulePipeline):
            raise BadInput(
                f"found a {type(self.model).__name__}, which diffusers cannot load",
                "a diffusers model",
                "keep `.model`, or make it a ModelMixin with a config and quantize that",
            )
        with folders.written_beside(Path(folder)) as fresh:
            self.pipe.save_pretrained(fresh)
        return Path(folder)
