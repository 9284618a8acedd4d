"""A layer's inputs and the error of its output, beside plain loops over the recorded calls."""

import pytest
import tiny
import torch

from lowtide import sampling
from lowtide.formats import Affine, mse
from lowtide.models import adapt
from lowtide.nn.swap import find_clock
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import run_call
from lowtide.stages.layer_error import LayerInputs, layer_inputs, output_errors, rounded_rows

CONVOLUTION = "mid_block.resnets.0.conv1"
LINEAR = "mid_block.attentions.0.to_q"


def job() -> Job:
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    settings = Settings(steps=3, images=2, calibration_steps=2, weights=3, inputs=4)
    job = Job(pipe, pipe.unet, adapt(pipe.unet), settings, "test")
    run_recipe((Collect(), Assign(per_step=True)), job)
    return job


def test_peaks_are_those_of_the_steps_that_have_rows():
    inputs = LayerInputs(lo=torch.zeros(3, 2), hi=torch.zeros(3, 2))
    inputs.add(torch.tensor([[1.0, 4.0], [-3.0, -2.0]]), 0)
    inputs.add(torch.tensor([[-5.0, 2.0], [1.0, 1.0]]), 0)
    inputs.add(torch.tensor([[9.0], [9.0]]), 1)
    inputs.add(torch.tensor([[1.0], [2.0]]), 2)
    for step in (2, 0):
        inputs.keep(torch.zeros(2, 2), step)
    assert inputs.lo.tolist() == [[-5, -3], [0, 0], [0, 0]]
    assert inputs.hi.tolist() == [[4, 1], [9, 9], [1, 2]]
    assert inputs.steps == [2, 2, 0, 0]
    assert inputs.peaks().tolist() == [[5, 3], [1, 2]]


@pytest.mark.parametrize("name", [CONVOLUTION, LINEAR])
def test_minima_and_maxima_of_channels_are_those_of_the_kept_calls(name):
    made = job()
    layer = made.model.get_submodule(name)
    inputs = layer_inputs(made, {name: layer}, 5)[name]
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    steps = [find_clock(made.model).known[call.timestep] for call in made.calls if call.kept]
    for call in made.calls:
        if call.kept:
            run_call(made, call)
    assert len(steps) == 2 and inputs.steps == [steps[0]] * 3 + [steps[1]] * 3  # 5 rows, rounded up
    for step, x in zip(steps, seen, strict=True):
        channels = x.transpose(0, 1) if x.dim() == 4 else x.flatten(0, 1).T
        assert torch.equal(inputs.lo[step], channels.flatten(1).amin(1).clamp(max=0))
        assert torch.equal(inputs.hi[step], channels.flatten(1).amax(1).clamp(min=0))
    (other,) = set(range(3)) - set(steps)
    assert not inputs.lo[other].any() and not inputs.hi[other].any()


@pytest.mark.parametrize("name", [CONVOLUTION, LINEAR])
@pytest.mark.parametrize("rounds", [True, False])
def test_output_errors_are_those_of_a_loop_over_rows(name, rounds):
    """Each row is rounded with the range of its own step, in smoothed channels."""
    made = job()
    layer = made.model.get_submodule(name)
    inputs = layer_inputs(made, {name: layer}, 6)[name]
    channels = inputs.lo.shape[1]
    smooth = torch.rand(channels, generator=torch.Generator().manual_seed(0)) + 0.5
    layer.set_smooth(smooth)
    if not rounds:
        layer.input.format = None
    columns = layer.weight[0].numel()
    spread = smooth[torch.arange(columns) // (columns // channels)]
    weight = layer.weight.flatten(1) * spread
    form = Affine(3, axis=0)
    grid = form.params(*mse(weight, form))
    coarse = form.decode(form.encode(weight, grid), grid)
    expected = torch.zeros(len(weight))
    for row, step in zip(torch.cat(inputs.patches), inputs.steps, strict=True):
        x = row / spread
        rounded = x
        if rounds:
            lo = (inputs.lo[step] / smooth).min()
            hi = (inputs.hi[step] / smooth).max()
            steps = Affine(4).params(lo, hi)
            rounded = Affine(4).decode(Affine(4).encode(x, steps), steps)
        expected += (weight @ x - coarse @ rounded).square()
    exact, rows = rounded_rows(layer, inputs)
    assert torch.equal(exact, rows) != rounds
    ours, other = output_errors(layer, inputs, (form, Affine(8, signed=True, axis=0)))
    assert torch.allclose(ours, expected, rtol=1e-4)
    assert other.sum() < ours.sum()
