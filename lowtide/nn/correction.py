"""Correction: subtract the known part of the quantized denoiser's error from its output.

eps' = (eps - bias) / (1 + slope), per step, with one bias per channel. Guidance mixes outputs with
weights that sum to one, so a correction of each branch equals a correction of the mixture. The
error that remains is noise. Its standard deviation at each step is stored too, so that a sampler
that adds noise of its own can add less (lowtide/sampling/variance_calibration.py).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowtide.nn.clock import Clock, at_step, find_clock

CORRECTION = "lowtide_correction"


class Correction(nn.Module):
    """Tables by step: slope, bias, and the standard deviation of the remaining noise.

    There is a bias for each of the first `channels` channels. A learned variance may follow them.
    """

    clock: Clock
    slope: Tensor  # (steps,)
    bias: Tensor  # steps x channels
    noise: Tensor  # (steps,)

    def __init__(self, clock: Clock, channels: int):
        super().__init__()
        # The clock belongs to the denoiser; a plain attribute keeps it out of this module's state.
        object.__setattr__(self, "clock", clock)
        self.active = True
        steps = len(clock.known)
        self.register_buffer("slope", torch.zeros(steps))
        self.register_buffer("bias", torch.zeros(steps, channels))
        self.register_buffer("noise", torch.zeros(steps))

    @property
    def index(self) -> Tensor:
        return self.clock.index.to(self.slope.device)

    def forward(self, eps: Tensor) -> Tensor:
        channels = self.bias.shape[1]
        axis = channel_axis(eps)
        shape = [1] * eps.dim()
        shape[0] = -1
        slope = at_step(self.slope, self.index).reshape(shape)
        shape[axis] = channels
        bias = at_step(self.bias, self.index).reshape(shape)
        noise, rest = eps.split([channels, eps.shape[axis] - channels], axis)
        corrected = (noise.float() - bias) / (1 + slope)
        return torch.cat([corrected.to(eps.dtype), rest], axis)

    def take(self, slope: Tensor, bias: Tensor, noise: Tensor) -> None:
        """Replace the tables. The number of steps may differ from before."""
        self.slope = slope
        self.bias = bias
        self.noise = noise

    def add(self, slope: Tensor, bias: Tensor, noise: Tensor) -> None:
        """Append the tables of more steps."""
        parts = zip((self.slope, self.bias, self.noise), (slope, bias, noise), strict=True)
        self.take(*map(torch.cat, parts))

    def remaining(self) -> float:
        """Standard deviation of the noise in the latest output; 0 if its samples mix steps."""
        return float(self.noise[self.index]) if self.active and not self.index.dim() else 0.0


def channel_axis(eps: Tensor) -> int:
    """The axis of the channels: the second of images, the last of tokens."""
    return 2 if eps.dim() == 3 else 1


def add_correction(root: nn.Module, channels: int) -> Correction:
    """Correct every output of the denoiser `root` from now on."""
    clock = find_clock(root)
    correction = Correction(clock, channels).to(clock.scale.device)
    root.add_module(CORRECTION, correction)
    root.register_forward_hook(_correct_output)
    return correction


def _correct_output(root: nn.Module, args: tuple, output: Any) -> Any:
    """The same kind of output, with its first part corrected."""
    correction = root.get_submodule(CORRECTION)
    if not correction.active:
        return output
    if isinstance(output, Tensor):
        return correction(output)
    if isinstance(output, tuple):
        return (correction(output[0]), *output[1:])
    return type(output)(sample=correction(output.sample))
