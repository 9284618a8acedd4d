"""ComfyUI: one file of a UNet, whose linear layers have int8 weights (`int8_tensorwise`).

What ComfyUI's loader reads of a layer, by its name:

    NAME.weight         int8, rows x columns
    NAME.weight_scale   float32, rows x 1
    NAME.comfy_quant    uint8, the bytes of the JSON {"format": "int8_tensorwise"}

(Comfy-Org/ComfyUI, comfy/ops.py, _load_quantized_module, and comfy/quant_ops.py, QUANT_ALGOS, at
0271a46.) comfy-kitchen rounds the input of such a layer to int8 by each row's own range. All other
tensors are float16.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
from safetensors.torch import save_file
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.exporting.comfyui_names import ComfyNames
from lowtide.formats import Mixed
from lowtide.kernels import Spec
from lowtide.kernels.ops import unpack_codes, zero_point
from lowtide.nn.packed import PackedLinear
from lowtide.nn.plan import Plan
from lowtide.report.wording import counted

FILE = "diffusion_model.safetensors"
FORMAT = {"format": "int8_tensorwise"}
LAST = 127


class IntegerWeight(NamedTuple):
    """An int8 weight, rows x columns, and the scale of each row, rows x 1."""

    codes: Tensor
    scale: Tensor


def check(model: nn.Module) -> None:
    """ComfyUI runs UNets of Stable Diffusion; its other networks join the layers of diffusers."""
    if not isinstance(model, UNet2DConditionModel):
        raise BadInput(
            f"found a {type(model).__name__}",
            "a UNet2DConditionModel, as Stable Diffusion 1, 2 and XL have it",
            "export to float, openvino or onnx",
        )


def integer_weights(model: nn.Module, plan: Plan) -> dict[str, IntegerWeight]:
    """The linear layers whose weights are integers times a scale for each row, unchanged."""
    inside = tuple(f"{name}." for name in (*plan.splits, *plan.cached, *plan.requests))
    found: dict[str, IntegerWeight] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLinear) or name.startswith(inside):
            continue
        if weight := _integer_weight(layer):
            found[name] = weight
    return found


def _integer_weight(layer: PackedLinear) -> IntegerWeight | None:
    """None where columns have divisors, a LoRA is added, or a code counts half steps."""
    spec = Spec.of(layer.spec)
    scale, zero, factor, smooth = layer.tables()
    if smooth.numel() or layer.side is not None:
        return None
    zeros = zero.float() if zero.numel() else zero_point(spec.weight, scale, factor)
    whole = unpack_codes(layer.codes(), spec).float() - zeros
    if isinstance(spec.weight, Mixed) or (whole % 1).any():
        return None
    if factor.numel():
        assert spec.weight.group is not None
        whole = whole * factor.float().repeat_interleave(spec.weight.group, 1)[:, : spec.columns]
    return IntegerWeight(whole.to(torch.int8), scale.clone())


def write(twin: nn.Module, exact: Mapping[str, IntegerWeight], path: Path) -> None:
    """Write the tensors of the float twin, with these weights as integers."""
    names = comfy_names(twin)
    marker = torch.tensor(list(json.dumps(FORMAT).encode()), dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    for name, tensor in twin.state_dict().items():
        layer, _, kind = name.rpartition(".")
        theirs = names.of(name)
        if kind != "weight" or layer not in exact:
            tensors[theirs] = tensor.to(torch.float16).contiguous()
            continue
        tensors[theirs] = exact[layer].codes.contiguous()
        tensors[f"{theirs}_scale"] = exact[layer].scale.contiguous()
        tensors[f"{theirs.removesuffix('weight')}comfy_quant"] = marker.clone()
    save_file(tensors, path)


def comfy_names(model: nn.Module) -> ComfyNames:
    """The names of this UNet's tensors."""
    config = cast(Any, model).config
    if not isinstance(config.layers_per_block, int):
        raise BadInput(
            f"found levels of {config.layers_per_block} layers",
            "as many layers in every level",
            "choose another --to",
        )
    return ComfyNames(config.layers_per_block, ["Attn" in kind for kind in config.up_block_types])


@torch.no_grad()
def as_run(twin: nn.Module, exact: Mapping[str, IntegerWeight]) -> nn.Module:
    """The twin with what ComfyUI computes: tensors of float16, and rounded inputs of int8 layers.

    Sums are in float32 here.
    """
    run = copy.deepcopy(twin)
    for parameter in run.parameters():
        parameter.copy_(parameter.half())
    for name, weight in exact.items():
        layer = run.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(weight.codes * weight.scale)
        layer.register_forward_pre_hook(_round_rows)
    return run


def _round_rows(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scale = (args[0].abs().amax(-1, keepdim=True) / LAST).clamp(min=1e-30)
    return ((args[0] / scale).round().clamp(-LAST - 1, LAST) * scale, *args[1:])


def losses(plan: Plan, exact: Mapping[str, IntegerWeight]) -> list[str]:
    """What the file does not have, one sentence each."""
    layers = sum(layer.weight is not None for layer in plan.layers.values())
    return [
        f"{counted(len(exact), 'linear layer')} of {layers} packed layers have int8 weights; "
        "all other tensors are float16.",
        "Inputs of these layers are rounded to int8 by each row's own range, and no other inputs.",
        "It is the UNet alone: ComfyUI takes text encoders and decoders from files of their own.",
    ]
