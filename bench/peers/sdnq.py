"""SDNQ: post-load quantization of linears and, on request, convolutions; needs no calibration."""

from functools import partial
from typing import Any

from sdnq import sdnq_post_load_quant
from sdnq.common import dtype_dict
from torch import nn

from peers.task import END_BITS, FLOAT, Bits, Held, Packed, Recipe, Task, Unable

PACKAGES = ("sdnq",)


def weights_type(bits: int) -> str:
    """What its configuration's documentation recommends: signed from 6 bits on, unsigned below."""
    return f"int{bits}" if bits >= 6 else f"uint{bits}"


def every_layer(task: Task) -> dict[str, Any]:
    """No threshold and no layers to skip: the layers that lowtide quantizes, at its bits."""
    ends = {} if task.bits.weights >= END_BITS else {"modules_dtype_dict": {"int8": task.ends}}
    return {
        "minimum_allowed_numel": 0,
        "minimum_allowed_channel_size": 0,
        "add_skip_keys": False,
    } | ends


def fit(task: Task, options: dict[str, Any]) -> Packed:
    inputs = task.bits.quantized_inputs
    if inputs and task.bits.inputs != 8:
        raise Unable(f"quantized matmul is int8, fp8 or fp16, not {task.bits.inputs} bits")
    matmul = {"use_quantized_matmul": inputs, "use_quantized_matmul_conv": inputs}
    weights = {"weights_dtype": weights_type(task.bits.weights), "quant_conv": True}
    model = sdnq_post_load_quant(task.model, **weights, **matmul, **options)
    task.replace(model)
    note = "inputs: dynamic, per row" if inputs else ""
    return Packed(model, held(model), model.save_pretrained, note)


def fit_every_layer(task: Task, **options: Any) -> Packed:
    return fit(task, every_layer(task) | options)


def held(model: nn.Module) -> dict[str, Held]:
    modules = model.named_modules()
    forms = {name: getattr(layer, "sdnq_dequantizer", None) for name, layer in modules}
    return {
        name: Held(bits_of(form), 8 if form.use_quantized_matmul else FLOAT)
        for name, form in forms.items()
        if form
    }


def bits_of(form: Any) -> int:
    return dtype_dict[form.weights_dtype]["num_bits"]


def low(bits: Bits) -> bool:
    return bits.weights < 8


# Not here: use_svd, whose float factors of rank 32 are as large as a small model's layers, and
# use_dynamic_quantization, which chooses the bits itself.
RECIPES = {
    "its own choice of layers": Recipe(lambda task: fit(task, {})),
    "every layer": Recipe(fit_every_layer),
    # With its default group size a convolution of few channels is one group. SDNQ 0.2.8 then loses
    # the shape that its matmul needs.
    "every layer, groups of 16": Recipe(partial(fit_every_layer, group_size=16), low),
    "every layer, Hadamard": Recipe(partial(fit_every_layer, use_hadamard=True), low),
    "every layer, codebook": Recipe(partial(fit_every_layer, use_codebook=True), low),
}
