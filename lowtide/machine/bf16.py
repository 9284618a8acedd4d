"""Products in bf16, where this machine takes clearly less time for them than in float32.

Having units for them does not say so: of two kinds of processor with avx512_bf16 one takes half the time, the other twice
(decision 0007). So a small convolution is raced, once a process, there and back, both taking turns.
"""

import statistics
import time
from functools import cache

import torch
import torch.nn.functional as F

PAYS = 0.8  # of the time in float32. Nearer to it, two runs on a busy machine might choose differently, for little.
TURNS = 5


def bf16_products(device: torch.device, wanted: bool = True) -> torch.autocast:
    """bf16 products where they pay."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=wanted and time_in_bf16(device.type) < PAYS
    )


def words(of: torch.Tensor) -> str:
    """What was chosen for a model with this parameter, and why."""
    if of.dtype != torch.float32:
        return f"products in {str(of.dtype).removeprefix('torch.')}, the model's own"
    found = time_in_bf16(of.device.type)
    if found < PAYS:
        return "products in bf16"
    return "products in float32" + (
        f": bf16 takes {found:.1f} x as long here" if found < float("inf") else ""
    )


@cache
def time_in_bf16(kind: str) -> float:
    """In parts of the time in float32, for a convolution's answer and its gradients; a GPU is not raced: its units pay."""
    if kind == "cuda":
        return 0.0 if torch.cuda.is_bf16_supported(including_emulation=False) else float("inf")
    return raced() if kind == "cpu" and torch.cpu._is_avx512_bf16_supported() else float("inf")


def raced() -> float:
    x, w = (torch.zeros(shape, requires_grad=True) for shape in ((4, 64, 32, 32), (64, 64, 3, 3)))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 + TURNS):
        for low, taken in seconds.items():
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                F.conv2d(x, w, padding=1).sum().backward()
            taken.append(time.perf_counter() - began)
    slow, fast = (
        statistics.median(taken[1:]) for taken in seconds.values()
    )  # the first turn of each warms up
    return fast / slow
