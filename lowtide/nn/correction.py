"""Correction: what is known of the quantized denoiser's error at each step, taken off its answer.

eps' = (eps - bias) / (1 + slope), per step, bias per channel. Guidance mixes answers with weights that sum to one, so
correcting each branch is the same as correcting their mixture.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowtide.nn.clock import CLOCK, Clock

CORRECTION = "lowtide_correction"


class Correction(nn.Module):
    """Tables by step: slope, and a bias for each of the first `channels` channels (a learned variance follows them)."""

    def __init__(self, clock: Clock, channels: int):
        super().__init__()
        object.__setattr__(self, "clock", clock)
        self.active = True
        self.register_buffer("slope", torch.zeros(len(clock.known)))
        self.register_buffer("bias", torch.zeros(len(clock.known), channels))

    def forward(self, eps: Tensor) -> Tensor:
        index, channels = self.clock.index.to(self.slope.device), self.bias.shape[1]
        axes = [1] * (eps.dim() - 2)
        bias, slope = self.bias[index].reshape(-1, channels, *axes), self.slope[index].reshape(-1, 1, *axes)
        noise, rest = eps[:, :channels], eps[:, channels:]
        return torch.cat([((noise.float() - bias) / (1 + slope)).to(eps.dtype), rest], 1)


def add_correction(root: nn.Module, channels: int) -> Correction:
    """Listen at the denoiser's own answers."""
    correction = Correction(root.get_submodule(CLOCK), channels)
    root.add_module(CORRECTION, correction)
    root.register_forward_hook(corrected)
    return correction


def corrected(root: nn.Module, args: tuple, answer: Any) -> Any:
    """The same kind of answer, with its first part corrected."""
    correction = root.get_submodule(CORRECTION)
    if not correction.active:
        return answer
    if isinstance(answer, Tensor):
        return correction(answer)
    if isinstance(answer, tuple):
        return (correction(answer[0]), *answer[1:])
    return type(answer)(sample=correction(answer.sample))
