"""Correction: what is known of the quantized denoiser's error at each step, taken off its answer.

eps' = (eps - bias) / (1 + slope), per step, bias per channel. Guidance mixes answers with weights that sum to one, so
correcting each branch is the same as correcting their mixture. What remains after that is noise; how much of it there is at each
step goes along, so that a sampler that adds noise of its own can add less (lowtide/sampling/variance_calibration.py).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowtide.nn.clock import CLOCK, Clock

CORRECTION = "lowtide_correction"


class Correction(nn.Module):
    """Tables by step: slope, a bias for each of the first `channels` channels (a learned variance follows them), and the
    standard deviation of the noise that remains."""

    def __init__(self, clock: Clock, channels: int):
        super().__init__()
        object.__setattr__(self, "clock", clock)
        self.active = True
        self.register_buffer("slope", torch.zeros(len(clock.known)))
        self.register_buffer("bias", torch.zeros(len(clock.known), channels))
        self.register_buffer("noise", torch.zeros(len(clock.known)))

    @property
    def index(self) -> Tensor:
        return self.clock.index.to(self.slope.device)

    def forward(self, eps: Tensor) -> Tensor:
        channels, axis = self.bias.shape[1], channel_axis(eps)
        shape = [1] * eps.dim()
        shape[0] = -1
        slope = self.slope[self.index].reshape(shape)
        shape[axis] = channels
        bias = self.bias[self.index].reshape(shape)
        noise, rest = eps.split([channels, eps.shape[axis] - channels], axis)
        return torch.cat([((noise.float() - bias) / (1 + slope)).to(eps.dtype), rest], axis)

    def reschedule(self, nearest: Tensor) -> None:
        """Each new step takes what is known of the old step that `nearest` names."""
        nearest = nearest.to(self.slope.device)
        self.slope, self.bias, self.noise = (
            self.slope[nearest],
            self.bias[nearest],
            self.noise[nearest],
        )

    def remaining(self) -> float:
        """Standard deviation of the noise in the answer that was just given; nothing is claimed of mixed steps."""
        return float(self.noise[self.index]) if self.active and not self.index.dim() else 0.0


def channel_axis(eps: Tensor) -> int:
    """Images have channels second, tokens last."""
    return 2 if eps.dim() == 3 else 1


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
