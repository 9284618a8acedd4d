"""Triton kernels of packed layers on NVIDIA GPUs: int8 tensor cores, and one pass for what follows.

    resident.py             the weight in the kernels' order, at its own bits
    tiles.py                tile shapes for each kind of card
    operands.py             what the launches share: grids, rounded rows, windows, epilogues
    *_launches.py           tensors in, tensors out
    operators.py            the same as operators of torch, safe in CUDA graphs and torch.compile
    int_products.py         linear and conv2d on int8 codes, with the layer's epilogue
    float_products.py       linear on float inputs and packed weights
    code_kernels.py         rounding, alone or after a norm
    attention_kernels.py    attention on rounded operands

This file, tiles.py and resident.py can be imported without triton. lowtide imports the others when
a packed layer runs on a GPU.
"""

import importlib.util
from functools import cache

import torch

OLDEST = (8, 0)  # int8 tensor cores with asynchronous copies


@cache
def missing(device: torch.device) -> str:
    """Why no Triton kernel runs on this device; empty if they run."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return f"Triton kernels run on CUDA, not on {device.type}"
    if torch.version.hip is not None:
        return "the Triton kernels are not tested on AMD cards"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        found = ".".join(map(str, capability))
        return f"the card has compute capability {found}, and 8.0 is the oldest that works"
    return ""
