"""Products: what a layer reads in the float model and what rounding costs its answer, for stages that weigh choices."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.formats import SEARCHES, Affine, Grid
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.swap import find_clock, set_precision
from lowtide.stages.base import Job
from lowtide.stages.fit_ranges import run_call


@dataclass
class Watched:
    """What one layer reads in the float model: ends of each channel at each step, and patches as rows of its matrix product."""

    lo: Tensor
    hi: Tensor
    patches: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def peaks(self) -> Tensor:
        """max |X| at each step that was seen, steps x channels."""
        found = torch.maximum(self.hi, -self.lo)
        return found[sorted(set(self.steps))]

    def note(self, x: Tensor, step: int) -> None:
        lo, hi = x.aminmax(dim=1)
        self.lo[step], self.hi[step] = (
            torch.minimum(self.lo[step], lo),
            torch.maximum(self.hi[step], hi),
        )

    def keep(self, patches: Tensor, step: int) -> None:
        self.patches.append(patches)
        self.steps += [step] * len(patches)


def watched(
    job: Job,
    layers: Mapping[str, QuantizedLayer],
    rows: int,
    weighed: Collection[str] | None = None,
) -> dict[str, Watched]:
    """One pass of the float model over the kept calls; about so many patches are kept of layers that are `weighed`, or of all."""
    set_precision(job.model, Precision.FLOAT)
    calls, seen = [call for call in job.calls if call.kept], {}
    each = -(-rows // len(calls))

    def note(name: str, layer: QuantizedLayer, x: Tensor) -> None:
        step, channels = int(find_clock(job.model).index), channels_first(x, layer)
        ends = torch.zeros(len(find_clock(job.model).known), len(channels), device=x.device)
        known = seen.setdefault(name, Watched(ends, ends.clone()))
        known.note(channels, step)
        if weighed is None or name in weighed:
            known.keep(
                patches(x, layer, job.generator("watched", name, str(len(known.patches))), each),
                step,
            )

    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, name=name: note(name, module, args[0].detach().float())
        )
        for name, layer in layers.items()
    ]
    for call in job.track(calls, "inputs of layers"):
        run_call(job, call)
    for hook in hooks:
        hook.remove()
    return seen


def channels_first(x: Tensor, layer: QuantizedLayer) -> Tensor:
    """Channels x everything else."""
    return (x.movedim(1, 0) if isinstance(layer, nn.Conv2d) else x.movedim(-1, 0)).flatten(1)


def patches(x: Tensor, layer: QuantizedLayer, generator: torch.Generator, count: int) -> Tensor:
    """A few rows of the matrix product that the layer is, from one sample."""
    sample = int(torch.randint(len(x), (), generator=generator))
    if isinstance(layer, nn.Conv2d):
        rows = F.unfold(
            x[sample : sample + 1], layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )[0].T
    else:
        rows = x[sample].reshape(-1, x.shape[-1])
    return rows[torch.randint(len(rows), (count,), generator=generator).to(x.device)]


def lost(layer: QuantizedLayer, seen: Watched, forms: Sequence[Affine]) -> Iterator[Tensor]:
    """|| X W - Q(X)Q(W) ||^2 of each output channel, with the layer smoothed as it is now, for each format of the weight."""
    weight, (exact, rounded) = layer.whole_weight().flatten(1).float(), rounded_rows(layer, seen)
    target = exact @ weight.T
    for form in forms:
        grid = form.params(*SEARCHES["mse"](form.rows(weight), form), len(weight))
        yield (target - rounded @ form.decode(form.encode(weight, grid), grid).T).square().sum(0)


def rounded_rows(layer: QuantizedLayer, seen: Watched) -> tuple[Tensor, Tensor]:
    """The patches, smoothed, and on the grid of their step."""
    smooth = layer.divisors.to(seen.lo)
    exact = torch.cat(seen.patches) / smooth.repeat_interleave(
        layer.weight[0].numel() // len(smooth)
    )
    if layer.input.format is None:
        return exact, exact
    lo, hi = ((ends / smooth) for ends in (seen.lo, seen.hi))
    grid = layer.input.format.params(lo.amin(1, keepdim=True), hi.amax(1, keepdim=True))
    grid = Grid(*(part[seen.steps] for part in (grid.scale, grid.zero)))
    return exact, layer.input.format.decode(layer.input.format.encode(exact, grid), grid)
