"""A layer's inputs in the float model, and the error of its output when both sides are rounded."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.formats import SEARCHES, Affine, Grid, OwnRange, Stepped
from lowtide.nn.layer_call import on_input
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.swap import QuantLayer, find_clock, set_precision
from lowtide.stages.base import Job
from lowtide.stages.fit_ranges import run_call


@dataclass
class LayerInputs:
    """The inputs of one layer in the float model.

    lo, hi: minimum and maximum of each channel at each step, steps x channels.
    patches: a sample of the rows of the layer's matrix product, each tensor rows x columns.
    steps: the step of each row.
    """

    lo: Tensor
    hi: Tensor
    patches: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def peaks(self) -> Tensor:
        """max |X| at each step that has rows, steps x channels."""
        peaks = torch.maximum(self.hi, -self.lo)
        return peaks[sorted(set(self.steps))]

    def add(self, x: Tensor, step: int) -> None:
        """Add values, channels x everything else, to the minima and maxima."""
        lo, hi = x.aminmax(dim=1)
        self.lo[step] = torch.minimum(self.lo[step], lo)
        self.hi[step] = torch.maximum(self.hi[step], hi)

    def keep(self, patches: Tensor, step: int) -> None:
        """Keep rows of the matrix product."""
        self.patches.append(patches)
        self.steps += [step] * len(patches)


def layer_inputs(
    job: Job,
    layers: Mapping[str, QuantLayer],
    rows: int,
    weighed: Collection[str] | None = None,
) -> dict[str, LayerInputs]:
    """The inputs of these layers, from one pass of the float model over the kept calls.

    About `rows` rows are kept of each layer in `weighed`, or of every layer.
    """
    set_precision(job.model, Precision.FLOAT)
    calls = [call for call in job.calls if call.kept]
    clock = find_clock(job.model)
    count = -(-rows // len(calls))
    inputs: dict[str, LayerInputs] = {}

    def record(name: str, layer: nn.Module, given: Tensor) -> None:
        assert isinstance(layer, QuantLayer)
        x = given.detach().float()
        step = int(clock.index)
        channels = _channels_first(x, layer)
        if name not in inputs:
            zeros = torch.zeros(len(clock.known), len(channels), device=x.device)
            inputs[name] = LayerInputs(lo=zeros, hi=zeros.clone())
        known = inputs[name]
        known.add(channels, step)
        if weighed is None or name in weighed:
            generator = job.generator("watched", name, str(len(known.patches)))
            known.keep(_patches(x, layer, generator, count), step)

    hooks = [on_input(layer, partial(record, name)) for name, layer in layers.items()]
    for call in job.track(calls, "inputs of layers"):
        run_call(job, call)
    for hook in hooks:
        hook.remove()
    return inputs


def layer_by_layer(
    job: Job, statistics: Mapping[str, LayerInputs], title: str
) -> Iterator[tuple[str, LayerInputs]]:
    """The inputs of each layer; meanwhile it and the norm before it are on the device."""
    for name, inputs in job.track(statistics.items(), title):
        names = filter(None, (name, job.adapter.norm_before(name)))
        with job.placement.visit(*map(job.model.get_submodule, names)):
            yield name, inputs


def _channels_first(x: Tensor, layer: QuantLayer) -> Tensor:
    """Channels x everything else."""
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    return x.movedim(axis, 0).flatten(1)


def _patches(x: Tensor, layer: QuantLayer, generator: torch.Generator, count: int) -> Tensor:
    """`count` random rows of the layer's matrix product, from one random sample of x."""
    number = int(torch.randint(len(x), (), generator=generator))
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        sample = x[number : number + 1]
        shape = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = F.unfold(sample, *shape)[0].T
    else:
        rows = x[number].reshape(-1, x.shape[-1])
    places = torch.randint(len(rows), (count,), generator=generator)
    return rows[places.to(x.device)]


def output_errors(
    layer: QuantizedLayer, inputs: LayerInputs, forms: Sequence[Affine]
) -> Iterator[Tensor]:
    """The output error for each of these formats of the weight, (output channels,).

    It is || X W - Q(X) Q(W) ||^2 of each output channel, with the layer smoothed as it is now.
    """
    weight = layer.smoothed_weight().flatten(1).float()
    exact, rounded = rounded_rows(layer, inputs)
    target = exact @ weight.T
    for form in forms:
        lo, hi = SEARCHES["mse"](form.rows(weight), form)
        grid = form.params(lo, hi, len(weight))
        rounded_weight = form.decode(form.encode(weight, grid), grid)
        yield (target - rounded @ rounded_weight.T).square().sum(0)


def rounded_rows(layer: QuantizedLayer, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
    """The kept rows, smoothed, and the same rows rounded with the range of their step.

    A range that values will have of their own is not known of a few rows: it lies within that of
    the step.
    """
    smooth = layer.divisors.to(inputs.lo)
    columns = layer.weight[0].numel()
    exact = torch.cat(inputs.patches) / smooth.repeat_interleave(columns // len(smooth))
    form = layer.input.format
    if form is None:
        return exact, exact
    assert not isinstance(form, Stepped), "bits of steps are chosen after the weights"
    form = Affine(form.bits) if isinstance(form, OwnRange) else form
    lo = (inputs.lo / smooth).amin(1, keepdim=True)
    hi = (inputs.hi / smooth).amax(1, keepdim=True)
    steps = form.params(lo, hi)
    grid = Grid(steps.scale[inputs.steps], steps.zero[inputs.steps])
    return exact, form.decode(form.encode(exact, grid), grid)
