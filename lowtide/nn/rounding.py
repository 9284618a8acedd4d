"""AdaRound: whether each weight is rounded up or down, learned through a stretched sigmoid.

The method is that of Nagel et al. (ICML 2020). An iteration does little work for each weight, and
there are many iterations, so the update is written out. It takes gradient, penalty, Adam's step and
new weights in place, in preallocated buffers. With autograd and an optimizer, which allocate memory
for each operation, the update of a small block takes as long as the products of the block.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowtide.machine.peak_memory import release_free_memory

# The sigmoid is stretched to [LOW, HIGH] and then clamped to [0, 1].
LOW = -0.1
HIGH = 1.1
WIDTH = HIGH - LOW
# The values of the sigmoid at which the clamp begins.
SIGMOID_LOW = -LOW / WIDTH
SIGMOID_HIGH = (1 - LOW) / WIDTH
# The number of weights that are updated at once. With fewer, the calls and the waiting of threads
# take the time; with more, the weights do not fit in any cache.
CHUNK = 1 << 19
# On a GPU one call updates so many, and the four buffers of an update take 256 MiB at most.
GPU_CHUNK = 1 << 24
# Layers are updated together up to this number of weights.
SMALL = CHUNK >> 2


class AdaRound(nn.Module):
    """One number per weight: soft() in [0, 1] while it learns, hard() at the end.

    It is a module without parameters, because a layer keeps it in the same place as a LoRA.
    """

    def __init__(
        self, position: Tensor, decode: Callable[[Tensor], Tensor], up: Tensor | None = None
    ):
        """`position`: each weight in units of its step, rows x columns.

        soft() starts at the fraction of the position, so that no weight moves at first. `decode`
        makes weights of codes. `up` holds earlier decisions for a warm start. Then soft() starts
        half-way between the fraction and the decision: on the chosen side, and near enough to the
        other side to change.
        """
        super().__init__()
        floor = position.floor()
        below = decode(floor)
        step = decode(floor + 1) - below
        # A weight is below + soft() * step. That is base + span * sigmoid, with the sigmoid clamped
        # to SIGMOID_LOW .. SIGMOID_HIGH.
        self.base = below + LOW * step
        self.span = WIDTH * step
        start = position - floor
        if up is not None:
            start = (start + up) / 2
        sigmoid = (start - LOW) / WIDTH
        self.alpha = torch.log(sigmoid / (1 - sigmoid))
        self.weight = torch.addcmul(self.base, sigmoid, self.span).requires_grad_()

    def soft(self) -> Tensor:
        """The share of the way from the value below to the value above, for each weight."""
        return (torch.sigmoid(self.alpha) * WIDTH + LOW).clamp(0, 1)

    def hard(self) -> Tensor:
        """True where the weight is rounded up. At the start this is rounding to nearest."""
        return self.alpha >= 0

    def values(self) -> Tensor:
        """The weights at the moment: from the value below, soft() of the way to the value above."""
        return self.weight

    def take_gradient(self) -> Tensor:
        """The gradient of the weights since the last call of this method: (weights,)."""
        gradient = self.weight.grad
        self.weight.grad = None
        if gradient is None:
            return torch.zeros(self.weight.numel(), device=self.weight.device)
        return gradient.reshape(-1)


@dataclass
class _Chunk:
    """Weights that are updated at once, (weights,) each, and Adam's averages of their gradient."""

    alpha: Tensor
    base: Tensor
    span: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor

    def pieces(self) -> list["_Chunk"]:
        """Equal pieces: small ones for a CPU, and as large as its buffers may be for a GPU."""
        size = len(self.alpha)
        most = CHUNK if self.alpha.device.type == "cpu" else GPU_CHUNK
        size = math.ceil(size / math.ceil(size / most))
        columns = [tensor.split(size) for tensor in vars(self).values()]
        return [_Chunk(*tensors) for tensors in zip(*columns, strict=True)]


class RoundingOptimizer:
    """The roundings of one unit while they learn, by Adam at `rate`.

    Small layers are updated together, and a large one in pieces.
    """

    def __init__(self, each: Sequence[AdaRound], rate: float):
        self.each = each
        self.rate = rate
        self.device = each[0].alpha.device
        self.steps = torch.zeros((), device=self.device)
        self.groups = [(group, _merged(group).pieces()) for group in _small_together(each)]
        largest = max(len(chunks[0].alpha) for _, chunks in self.groups)
        self.sigmoid = torch.empty(largest, device=self.device)
        self.gap = torch.empty(largest, device=self.device)
        self.slope = torch.empty(largest, device=self.device)
        self.gradient = torch.empty(largest, device=self.device)
        release_free_memory()

    @torch.no_grad()
    def step(self, penalty: float, sharpness: float) -> None:
        """Update all weights in place by the gradients that they hold and by the penalty.

        The gradients of the weights are taken and reset.
        """
        self.steps.add_(1)
        for group, chunks in self.groups:
            gradients = self._gradients(group, len(chunks[0].alpha))
            for chunk, gradient in zip(chunks, gradients, strict=True):
                self._update(chunk, gradient, penalty, sharpness)

    def _update(self, chunk: _Chunk, gradient: Tensor, penalty: float, sharpness: float) -> None:
        """One step of Adam on alpha, and the new weights. `gradient` is that of the weights."""
        size = len(gradient)
        sigmoid = torch.sigmoid(chunk.alpha, out=self.sigmoid[:size])
        slope = self.slope[:size]
        if penalty:
            penalty_gradient(sigmoid, penalty, sharpness, gap=self.gap[:size], out=slope)
            slope.addcmul_(gradient, chunk.span)
        else:
            torch.mul(gradient, chunk.span, out=slope)
        torch.ops.aten.hardtanh_backward.grad_input(
            slope, sigmoid, SIGMOID_LOW, SIGMOID_HIGH, grad_input=slope
        )
        torch.ops.aten.sigmoid_backward.grad_input(slope, sigmoid, grad_input=slope)
        _adam_step(chunk, slope, self.steps, self.rate)
        torch.sigmoid(chunk.alpha, out=sigmoid).clamp_(SIGMOID_LOW, SIGMOID_HIGH)
        torch.addcmul(chunk.base, sigmoid, chunk.span, out=chunk.weight)

    def _gradients(self, group: Sequence[AdaRound], size: int) -> Sequence[Tensor]:
        """The gradient of each chunk of the group; a group of several layers is one chunk."""
        gradients = [rounding.take_gradient() for rounding in group]
        if len(gradients) == 1:
            return gradients[0].split(size)
        return [torch.cat(gradients, out=self.gradient[:size])]

    def forget_gradients(self) -> None:
        """Drop the gradients of an attempt that failed."""
        for rounding in self.each:
            rounding.weight.grad = None

    def settled(self) -> bool:
        """Whether soft() of every weight is within 0.05 of 0 or 1."""
        return all(bool(((rounding.soft() - 0.5).abs() > 0.45).all()) for rounding in self.each)


def _small_together(each: Sequence[AdaRound]) -> Iterator[list[AdaRound]]:
    """Groups of neighbours with at most SMALL weights in all, and larger layers alone."""
    group: list[AdaRound] = []
    for rounding in each:
        if group and sum(member.alpha.numel() for member in (*group, rounding)) > SMALL:
            yield group
            group = []
        group.append(rounding)
    yield group


@torch.no_grad()
def _merged(group: Sequence[AdaRound]) -> _Chunk:
    """The tensors of the group, concatenated. From now on, each rounding has views of them."""
    sizes = [rounding.alpha.numel() for rounding in group]
    merged: dict[str, Tensor] = {}
    for name in ("alpha", "base", "span", "weight"):
        merged[name] = _joined([getattr(rounding, name).reshape(-1) for rounding in group])
        for rounding, part in zip(group, merged[name].split(sizes), strict=True):
            setattr(rounding, name, part.view(rounding.alpha.shape))
    for rounding in group:
        rounding.weight.requires_grad_()
    first = torch.zeros_like(merged["alpha"])
    return _Chunk(**merged, first=first, second=torch.zeros_like(first))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one; a single one is not copied."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0].detach()


def penalty_gradient(
    sigmoid: Tensor, penalty: float, sharpness: float, *, gap: Tensor, out: Tensor
) -> Tensor:
    """The gradient of AdaRound's penalty with respect to the sigmoid, in `out`.

    The penalty is the sum of 1 - |u|^b, with u = 2 soft - 1 = 2 WIDTH (sigmoid - 1/2) and b the
    sharpness. With d = 1/2 - sigmoid its gradient is b (2 WIDTH)^b d |d|^(b-2). `gap` is a buffer
    for d.
    """
    torch.sub(0.5, sigmoid, out=gap)
    # |d|^(b-2) is computed from the logarithm of d^2, because pow takes four times as long. The
    # exponent is clamped, because denormal numbers take four times as long, too.
    strength = math.log(penalty * sharpness) + sharpness * math.log(2 * WIDTH)
    torch.mul(gap, gap, out=out).log_()
    torch.add(strength, out, alpha=max(sharpness / 2 - 1, 1e-6), out=out).clamp_(min=-60)
    return out.exp_().mul_(gap)


def _adam_step(chunk: _Chunk, gradient: Tensor, steps: Tensor, rate: float) -> None:
    """A step of torch.optim.Adam(fused=True) on alpha.

    It is called without the optimizer, whose own work takes longer than the step of a small layer.
    """
    # torch has this function and does not declare it as public.
    torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
        [chunk.alpha],
        [gradient],
        [chunk.first],
        [chunk.second],
        [],
        [steps],
        lr=rate,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.0,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
