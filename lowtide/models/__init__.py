"""Architectures: units, blocks, the temporal block, in forward order; nothing of quantization."""

from dataclasses import replace
from typing import Any

from torch import nn

from lowtide.errors import BadInput
from lowtide.models import transformer, unet
from lowtide.models.adapter import Adapter, Architecture, Unit, check_example
from lowtide.models.generic import generic_architecture, like

__all__ = ["ARCHITECTURES", "Adapter", "Architecture", "Unit", "adapt"]

ARCHITECTURES: dict[type[nn.Module], Architecture] = unet.ARCHITECTURES | transformer.ARCHITECTURES


def adapt(model: nn.Module, example: dict[str, Any] | None = None) -> Adapter:
    """The adapter of a model; `example` gives one call's inputs by name, for real shapes or for a model nobody described."""
    if example is not None:
        check_example(model, example)
    architecture = next(
        (ARCHITECTURES[kind] for kind in type(model).__mro__ if kind in ARCHITECTURES), None
    )
    if architecture is None and example is None:
        raise BadInput(
            f"found {type(model).__name__}",
            f"one of {', '.join(known.__name__ for known in ARCHITECTURES)}, or an example input",
            "pass example={'sample': ..., 'timestep': ...}, or write an Architecture (docs/architecture.md)",
        )
    if example is not None:
        known = architecture or generic_architecture(model, example)
        architecture = replace(known, example=like(example, known.shared))
    return Adapter(model, architecture)
