"""Architectures: their units and blocks in forward order; nothing of quantization."""

from dataclasses import replace

from torch import nn

from lowtide.errors import BadInput
from lowtide.models import transformer, unet
from lowtide.models.adapter import (
    Adapter,
    Answer,
    Architecture,
    Arguments,
    Unit,
    answer_of,
    check_example,
)
from lowtide.models.generic import generic_architecture, like

__all__ = [
    "ARCHITECTURES",
    "Adapter",
    "Answer",
    "Architecture",
    "Arguments",
    "Unit",
    "adapt",
    "answer_of",
]

ARCHITECTURES: dict[type[nn.Module], Architecture] = unet.ARCHITECTURES | transformer.ARCHITECTURES


def adapt(
    model: nn.Module, example: Arguments | None = None, known: Architecture | None = None
) -> Adapter:
    """The adapter of a model.

    Args:
        model: the denoiser.
        example: one call's inputs by name. It gives the real shapes, and it describes a model whose
            class is not in ARCHITECTURES.
        known: the architecture, where it was recorded before.
    """
    listed = (ARCHITECTURES[kind] for kind in type(model).__mro__ if kind in ARCHITECTURES)
    architecture = known or next(listed, None)
    if example is not None:
        check_example(model, example)
        architecture = architecture or generic_architecture(model, example)
        architecture = replace(architecture, example=like(example, architecture))
    if architecture is None:
        names = ", ".join(kind.__name__ for kind in ARCHITECTURES)
        raise BadInput(
            f"found {type(model).__name__}",
            f"one of {names}, or an example input",
            "pass example={'sample': ..., 'timestep': ...}, "
            "or write an Architecture (docs/architecture.md)",
        )
    return Adapter(model, architecture)
