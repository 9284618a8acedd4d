"""A quantizer: a format for inputs plus the range it has learnt, one per sampling step when it has a clock."""

import torch
from torch import Tensor, nn

from lowtide.formats import Affine, Format, Grid, Log2
from lowtide.kernels import quantize_input
from lowtide.nn.clock import Clock


class Quantizer(nn.Module):
    """Rounds what passes through. `format` None is the identity; `steps` is the length of the leading axis of its range."""

    def __init__(self, format: Affine | Log2 | None, clock: Clock | None = None, steps: int = 1):
        super().__init__()
        self.format, self.enabled = format, False
        self.learnt: nn.Parameter | None = None
        # The clock belongs to the denoiser; a plain attribute keeps it out of this module's own state.
        object.__setattr__(self, "clock", clock)
        if format is not None:
            self.register_buffer("scale", torch.ones(steps if clock else 1, dtype=torch.float32))
            self.register_buffer("zero", torch.zeros(steps if clock else 1, dtype=torch.uint8))

    def step(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of the running step: shape () or (batch,)."""
        if self.clock is None:
            return self.scale[0], self.zero[0]
        index = self.clock.index.to(self.scale.device)
        return self.scale[index], self.zero[index]

    def forward(self, x: Tensor) -> Tensor:
        if self.format is None or not self.enabled:
            return x
        scale, zero = self.step()
        if self.learnt is not None:
            return self.learning_forward(x, zero)
        if isinstance(self.format, Log2):
            shape = (-1, *[1] * (x.dim() - 1)) if scale.dim() else ()
            grid = Grid(scale.reshape(shape), zero)
            return self.format.decode(self.format.encode(x, grid), grid).to(x.dtype)
        return quantize_input(x, scale, zero, self.format.top)

    def start_learning(self) -> nn.Parameter:
        """Learn the logarithm of the scale from here on: a step changes it by a share, and it stays positive."""
        self.learnt = nn.Parameter(self.scale.log())
        return self.learnt

    def learning_forward(self, x: Tensor, zero: Tensor) -> Tensor:
        """The same rounding, with the gradient passed straight through it."""
        scale = self.learnt[0 if self.clock is None else self.clock.index.to(x.device)].exp()
        if scale.dim():
            shape = (-1, *[1] * (x.dim() - 1))
            scale, zero = (part.repeat_interleave(x.shape[0] // len(part)).reshape(shape) for part in (scale, zero))
        place = x / scale + zero.float()
        place = (place + (place.round() - place).detach()).clamp(0, self.format.top)
        return (place - zero.float()) * scale

    @torch.no_grad()
    def finish_learning(self) -> None:
        self.scale.copy_(self.learnt.exp())
        self.learnt = None

    @torch.no_grad()
    def fit(self, lo: Tensor, hi: Tensor) -> None:
        """Take the range: one lo and hi for each step."""
        grid = self.format.params(lo.reshape(-1), hi.reshape(-1))
        self.scale.copy_(grid.scale)
        self.zero.copy_(grid.zero.to(torch.uint8))


def input_format(bits: int) -> Format | None:
    """Inputs are unsigned and lopsided (SiLU, softmax), so their zero is free; 16 and 32 bits leave them in float."""
    return Affine(bits) if bits <= 8 else None
