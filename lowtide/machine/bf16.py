"""Products in bf16, on machines where they take clearly less time than in float32.

Hardware support for bf16 does not answer the question: of two kinds of processor with avx512_bf16,
one takes half the time in bf16 and the other takes twice the time (decision 0007). So a small
convolution is timed once per process, forward and backward, in both precisions by turns. A run that
is resumed keeps to the answer of its start (stages/conditions.py).
"""

import time
from functools import cache

import torch
import torch.nn.functional as F

# The largest share of the float32 time at which bf16 is used. Nearer to 1, two runs on a busy
# machine might choose differently, and the gain would be small.
MAX_TIME_RATIO = 0.8
REPEATS = 5


def bf16_products(device: torch.device, *, wanted: bool = True) -> torch.autocast:
    """A context that computes products in bf16, where this is wanted and faster on the device."""
    return products(device, low=wanted and pays(device.type))


def products(device: torch.device, *, low: bool) -> torch.autocast:
    """A context that computes products in bf16, or in the tensors' own precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def pays(kind: str) -> bool:
    """Whether products in bf16 take clearly less time on this kind of device."""
    return time_in_bf16(kind) < MAX_TIME_RATIO


def describe_products(parameter: torch.Tensor, *, low: bool) -> str:
    """The precision of products for a model with this parameter, and the reason for it.

    low: bf16 is used, as `pays` said when the run began.
    """
    if parameter.dtype != torch.float32:
        return f"products in {str(parameter.dtype).removeprefix('torch.')}, the model's own"
    if low:
        return "products in bf16"
    ratio = time_in_bf16(parameter.device.type)
    slower = MAX_TIME_RATIO <= ratio < float("inf")
    return f"products in float32{f': bf16 takes {ratio:.1f} x as long here' if slower else ''}"


@cache
def time_in_bf16(kind: str) -> float:
    """The time in bf16 divided by the time in float32, for this kind of device.

    Infinity where the hardware has no bf16 units. A GPU with such units is not timed: they are
    always faster, so the answer is 0.
    """
    if kind == "cuda":
        return 0.0 if torch.cuda.is_bf16_supported(including_emulation=False) else float("inf")
    has_units = kind == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return measure_time_ratio() if has_units else float("inf")


def measure_time_ratio() -> float:
    """The time of a convolution with gradients on the CPU: bf16 divided by float32.

    The least processor time of a few: other work on the machine adds to some of them.
    """
    x = torch.zeros((4, 64, 32, 32), requires_grad=True)
    weight = torch.zeros((64, 64, 3, 3), requires_grad=True)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 + REPEATS):
        for low_precision, times in seconds.items():
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
                F.conv2d(x, weight, padding=1).sum().backward()
            times.append(time.process_time() - start)
    # The first run of each precision is a warm-up.
    return min(seconds[True][1:]) / min(seconds[False][1:])
