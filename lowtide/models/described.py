"""A recorded architecture as JSON, which a checkpoint keeps: shapes of one call's inputs, no data.

A denoiser whose class ARCHITECTURES does not list can then be recorded again without its pipeline.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.models.adapter import Adapter, Architecture
from lowtide.models.generic import block_classes, like

TENSOR = "tensor"


def described(architecture: Architecture) -> dict[str, Any]:
    """The architecture as JSON; empty where it is not from a recording."""
    if architecture.recorded is None:
        return {}
    return {
        "inputs": {name: _plain(name, each) for name, each in architecture.recorded.items()},
        "shared": list(architecture.shared),
        "repeated": dict(architecture.repeated),
        "ticks": architecture.ticks,
        "blocks": list(architecture.blocks),
    }


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return {TENSOR: list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_plain(name, each) for each in value]}
    if isinstance(value, Mapping):
        return {"dict": {key: _plain(name, each) for key, each in value.items()}}
    raise BadInput(
        f"found the input {name} of the denoiser, a {type(value).__name__}",
        "tensors, numbers and texts",
        "leave it out of the pipeline's call",
    )


def _real(data: Mapping[str, Any]) -> Any:
    if TENSOR in data:
        return torch.empty(data[TENSOR], dtype=getattr(torch, data["dtype"]), device="meta")
    ((kind, content),) = data.items()
    if kind == "value":
        return content
    if kind == "dict":
        return {name: _real(each) for name, each in content.items()}
    return {"list": list, "tuple": tuple}[kind](_real(each) for each in content)


def described_adapter(model: nn.Module, data: Mapping[str, Any]) -> Adapter:
    """The adapter of a model whose architecture was recorded before."""
    inputs = {name: _real(each) for name, each in data["inputs"].items()}
    blocks = tuple(data["blocks"]) or block_classes(model)
    plain = Architecture(
        blocks,
        like(inputs),
        data["ticks"],
        tuple(data["shared"]),
        data["repeated"],
        inputs,
    )
    return Adapter(model, replace(plain, example=like(inputs, plain)))
