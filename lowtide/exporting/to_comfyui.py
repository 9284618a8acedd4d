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
from lowtide.exporting.stored_values import rows_of
from lowtide.kernels import Spec
from lowtide.nn.packed import PackedLinear
from lowtide.nn.plan import Plan
from lowtide.report.wording import counted

FILE = "diffusion_model.safetensors"
FORMAT = {"format": "int8_tensorwise"}
LAST = 127


class Int8Weight(NamedTuple):
    """An int8 weight, rows x columns, and the scale of each row, rows x 1.

    exact: the packed layer has these very values.
    """

    codes: Tensor
    scale: Tensor
    exact: bool


def check(model: nn.Module) -> None:
    """ComfyUI runs UNets of Stable Diffusion; its other networks join the layers of diffusers."""
    if not isinstance(model, UNet2DConditionModel):
        raise BadInput(
            f"found a {type(model).__name__}",
            "a UNet2DConditionModel, as Stable Diffusion 1, 2 and XL have it",
            "export to float, openvino or onnx",
        )


def integer_weights(model: nn.Module, twin: nn.Module, plan: Plan) -> dict[str, Int8Weight]:
    """The weights of all linear layers that were packed, by name."""
    packed = {name: each for name, each in model.named_modules() if isinstance(each, PackedLinear)}
    found: dict[str, Int8Weight] = {}
    for name, layer in twin.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if name in packed and is_integer(packed[name]):
            found[name] = _own_integers(packed[name])
        elif name in packed or name in plan.splits:
            found[name] = _rounded_again(layer.weight)
    return found


def is_integer(layer: PackedLinear) -> bool:
    """Whether the weight is integers times a scale for each row: no divisors, and no LoRA."""
    return not layer.tables()[-1].numel() and layer.side is None


def _own_integers(layer: PackedLinear) -> Int8Weight:
    codes, zero, scale = rows_of(layer).whole()
    whole = codes - zero
    group = Spec.of(layer.spec).weight.group
    if group is not None:
        factors = layer.tables()[2].float().repeat_interleave(group, 1)
        whole = whole * factors[:, : whole.shape[1]]
    return Int8Weight(whole.to(torch.int8), scale.clone(), exact=True)


def _rounded_again(weight: Tensor) -> Int8Weight:
    """The weight rounded to int8, each row by its largest value."""
    scale = _row_scale(weight)
    return Int8Weight((weight / scale).round().to(torch.int8), scale, exact=False)


def _row_scale(values: Tensor) -> Tensor:
    return (values.abs().amax(-1, keepdim=True) / LAST).clamp(min=1e-30)


def write(twin: nn.Module, integers: Mapping[str, Int8Weight], path: Path) -> None:
    """Write the tensors of the float twin, with these weights as integers."""
    names = comfy_names(twin)
    marker = torch.tensor(list(json.dumps(FORMAT).encode()), dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    for name, tensor in twin.state_dict().items():
        layer, _, kind = name.rpartition(".")
        theirs = names.of(name)
        if kind != "weight" or layer not in integers:
            tensors[theirs] = tensor.to(torch.float16).contiguous()
            continue
        tensors[theirs] = integers[layer].codes.contiguous()
        tensors[f"{theirs}_scale"] = integers[layer].scale.contiguous()
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
def as_run(twin: nn.Module, integers: Mapping[str, Int8Weight]) -> nn.Module:
    """The twin with what ComfyUI computes: tensors of float16, and rounded inputs of int8 layers.

    Sums are in float32 here.
    """
    run = copy.deepcopy(twin)
    for parameter in run.parameters():
        parameter.copy_(parameter.half())
    for name, weight in integers.items():
        layer = run.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(weight.codes * weight.scale)
        layer.register_forward_pre_hook(_round_rows)
    return run


def _round_rows(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scale = _row_scale(args[0])
    return ((args[0] / scale).round().clamp(-LAST - 1, LAST) * scale, *args[1:])


def losses(plan: Plan, integers: Mapping[str, Int8Weight]) -> list[str]:
    """What the file does not have, one sentence each."""
    layers = sum(layer.weight is not None for layer in plan.layers.values())
    again = sum(not weight.exact for weight in integers.values())
    lost = [
        f"{counted(len(integers), 'linear layer')} of {layers} packed layers have int8 weights; "
        "all other tensors are float16.",
        "Inputs of these layers are rounded to int8 by each row's own range, and no other inputs.",
        "It is the UNet alone: ComfyUI takes text encoders and decoders from files of their own.",
    ]
    if again:
        lost.append(
            f"Weights of {counted(again, 'linear layer')} are rounded to int8 once more, because "
            "their columns have divisors, two ranges or a LoRA."
        )
    return lost
