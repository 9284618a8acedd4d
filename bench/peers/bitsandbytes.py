"""bitsandbytes through diffusers: LLM.int8 (W8A8, outliers in float) and NF4 weights."""

import inspect
import tempfile
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from diffusers import BitsAndBytesConfig
from safetensors.torch import save_file
from torch import nn

from peers.task import FLOAT, Bits, Held, Packed, Recipe, Task, Unable

PACKAGES = ("bitsandbytes",)


def config(bits: Bits) -> Any:
    if bits == Bits(8, 8):
        return BitsAndBytesConfig(load_in_8bit=True)
    if bits == Bits(4, 16):
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    parameters = inspect.signature(BitsAndBytesConfig).parameters
    offered = [name for name in parameters if name.startswith("load_in")]
    raise Unable(f"offers {' and '.join(offered)} only: W8A8 and W4A16")


def fit(task: Task) -> Packed:
    chosen = config(task.bits)
    with tempfile.TemporaryDirectory() as folder:
        task.model.save_pretrained(folder)
        model = type(task.model).from_pretrained(
            folder, quantization_config=chosen, dtype=torch.float32
        )
    task.replace(model.eval())
    return Packed(model, held(model), model.save_pretrained)


def own_modules(task: Task) -> Packed:
    """Its Linear classes swapped in by hand, because diffusers needs a GPU for it."""
    config(task.bits)
    for name in task.weights:
        layer = task.model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            task.model.set_submodule(name, replacement(layer, task.bits.weights).to("cpu"))
    with torch.no_grad():
        task.model(**task.calls[0])
    return Packed(
        task.model,
        held(task.model),
        lambda folder: save_file(task.model.state_dict(), folder / "model.safetensors"),
    )


def replacement(layer: nn.Linear, bits: int) -> nn.Module:
    shape = (layer.in_features, layer.out_features)
    biased = layer.bias is not None
    if bits == 8:
        fresh = Linear8bitLt(*shape, bias=biased, has_fp16_weights=False)
        fresh.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        fresh = Linear4bit(*shape, bias=biased, compute_dtype=torch.float32, quant_type="nf4")
        fresh.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    fresh.bias = layer.bias
    return fresh


def held(model: nn.Module) -> dict[str, Held]:
    kinds = {Linear8bitLt: Held(8, 8), Linear4bit: Held(4, FLOAT)}
    modules = model.named_modules()
    return {name: kinds[type(layer)] for name, layer in modules if type(layer) in kinds}


RECIPES = {
    "linears, through diffusers": Recipe(fit),
    "linears, its own modules": Recipe(own_modules),
}
