"""Fisher weights: squared gradients of the answer, their mean is J' J, and they weigh the loss."""

import pytest
import tiny
import torch

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.methods import recipe_of
from lowtide.models import adapt
from lowtide.models.trace import leaves_of
from lowtide.nn.swap import quant_layers
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fisher import fisher_weights
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.stream import Stream
from lowtide.stages.tape import Store

LAST = "conv_out"
BEFORE = "up_blocks.1.resnets.1"
OPTIONS = {"steps": 4, "images": 2, "calibration_steps": 4, "iters": 10, "batch": 2}


def started(model, **options) -> Job:
    model.requires_grad_(False)
    settings = Settings(**OPTIONS | options)
    job = Job(sampling.as_pipeline(model), model, adapt(model), settings, "test")
    run_recipe((Collect(), Assign(per_step=True)), job)
    return job


def test_their_mean_is_the_diagonal_of_the_gauss_newton_matrix():
    """Of the last layer it is 1. Of the block before, it is computed one value at a time."""
    job = started(tiny.model("unet2d"), images=16, calibration_steps=4)
    weights = fisher_weights(job, [LAST, BEFORE], Store(1 << 30))
    ones = torch.cat(weights[LAST].tapes[0].batches)
    assert ones.mean().item() == pytest.approx(1, abs=0.05)
    squares = torch.cat(weights[BEFORE].tapes[0].batches)
    call = next(call for call in job.calls if call.kept)
    exact = torch.zeros_like(squares[0])
    for sample in range(len(call.arguments["sample"])):
        exact += diagonal(job.model, call, sample) / len(call.arguments["sample"])
    by_channel = squares.mean((0, 2, 3))
    expected = exact.mean((1, 2))
    assert ((by_channel - expected).norm() / expected.norm()).item() < 0.25


def diagonal(model, call, sample):
    """diag(J' J) of the answer to one sample, with respect to the block's output."""
    outputs = []
    hook = model.get_submodule(BEFORE).register_forward_hook(
        lambda module, args, result: outputs.append(result.requires_grad_())
    )
    x = call.arguments["sample"][sample : sample + 1]
    answer = model(x, call.arguments["timestep"][:1])[0].flatten()
    hook.remove()
    total = torch.zeros_like(outputs[0][0])
    for value in answer:
        total += torch.autograd.grad(value, outputs[0], retain_graph=True)[0][0].square()
    return total


def test_the_loss_of_a_unit_weighs_its_errors():
    job = started(tiny.model("unet2d"))
    run_recipe((FitWeights("mse"),), job)
    stream = Stream(job, fisher=True)
    data = next(each for each in stream.walk() if each.unit.name == "mid_block.resnets.0")
    weighted = data.loss(torch.Generator().manual_seed(0)).item()
    chosen = data.choose(torch.Generator().manual_seed(0))
    ours = leaves_of(data.answer(chosen))[0]
    ref = leaves_of(data.node.output)[0]
    error = (ours - data.rows(data.targets[ref.id], ref.id, chosen)).square()
    whole = torch.cat(data.fisher.tapes[0].batches)
    factors = data.select(data.fisher.tapes[0], chosen) / whole.mean()
    assert weighted == pytest.approx((error * factors).sum(1).mean().item(), rel=1e-4)
    data.fisher = None
    assert data.loss(torch.Generator().manual_seed(0)).item() != pytest.approx(weighted, rel=1e-3)


def test_it_changes_roundings_and_is_an_option_of_the_stage():
    codes = []
    for fisher in (False, True):
        pipe = sampling.as_pipeline(tiny.model("unet2d"))
        stages = {"reconstruct": {"fisher": fisher}}
        result = lowtide.quantize(pipe, method="tfmq", stages=stages, **OPTIONS)
        codes.append(result.model.mid_block.resnets[0].conv1.codes())
    assert (codes[0] != codes[1]).any()


def test_layer_by_layer_has_no_gradients_of_blocks():
    settings = Settings(scope="layer", stages={"reconstruct": {"fisher": True}})
    with pytest.raises(BadInput, match="found fisher with scope layer"):
        recipe_of("tfmq", settings)


def test_gradients_leave_the_model_as_it_was():
    job = started(tiny.model("unet2d"))
    run_recipe((FitWeights("mse"),), job)
    before = {name: layer.weight.clone() for name, layer in quant_layers(job.model)}
    fisher_weights(job, [LAST], Store(1 << 30))
    for name, layer in quant_layers(job.model):
        assert torch.equal(layer.weight, before[name]) and layer.weight.grad is None
    assert not any(call.arguments["sample"].requires_grad for call in job.calls)
