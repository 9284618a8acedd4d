"""MPQ-DM: bits average exactly N, the search is the paper's, checkpoints load."""

from dataclasses import replace

import pytest
import tiny
import torch
from mpq_jobs import prepared, quantized

import lowtide
from lowtide import sampling
from lowtide.costs.workload import patch_bytes
from lowtide.errors import BadInput
from lowtide.formats import SEARCHES, Mixed
from lowtide.methods import mpq
from lowtide.methods.mpq import OMQ, PATCHES, TRD, best_groups, divisors, errors, kurtosis
from lowtide.nn.packed import Packed
from lowtide.nn.precision import Precision
from lowtide.nn.swap import packed_layers, quant_layers, set_precision
from lowtide.settings import Settings
from lowtide.stages.assign import weight_format
from lowtide.stages.base import Job
from lowtide.stages.distill import Distill
from lowtide.stages.fit_ranges import run_call
from lowtide.stages.layer_error import layer_inputs, rounded_rows


def mixed(job: Job) -> dict[str, Mixed]:
    return {
        name: layer.format
        for name, layer in quant_layers(job.model)
        if isinstance(layer.format, Mixed)
    }


def test_kurtosis_is_three_for_a_gaussian_and_higher_with_outliers():
    rows = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0))
    rows[1, :20] *= 12
    rows[2] = torch.linspace(-1, 1, 20_000)
    kappa = kurtosis(rows)
    assert kappa[0] == pytest.approx(3, abs=0.1)
    assert kappa[1] > 10
    assert kappa[2] == pytest.approx(1.8, abs=0.01)


@pytest.mark.parametrize("search", ["full", "fast"])
@pytest.mark.parametrize("weights", [2, 3, 7])
def test_bits_average_exactly_n_in_every_layer(search, weights):
    job = prepared(OMQ(search), weights=weights)
    layers = mixed(job)
    groups = job.report["mpq"]["groups"]
    assert len(groups) > 20
    assert set(layers) == {
        name for name in groups if groups[name]
    }  # where nothing is gained all rows keep one width
    assert all(sum(form.bits) == weights * len(form.bits) for form in layers.values())
    assert all(set(form.bits) <= {weights - 1, weights, weights + 1} for form in layers.values())
    assert job.report["mpq"]["average_bits"] == weights
    assert {job.plan.layers[name].weight for name in layers} == set(layers.values())
    assert not set(job.adapter.ends()) & set(layers)
    assert weights == 7 or layers


def test_plus_raises_a_tenth_and_lowers_none():
    job = prepared(OMQ(plus=True))
    for form in mixed(job).values():
        assert sorted(form.bits) == [2] * (len(form.bits) - len(form.bits) // 10) + [3] * (
            len(form.bits) // 10
        )
    assert 2 < job.report["mpq"]["average_bits"] < 2.1


@pytest.mark.parametrize("search", ["slow", ""])
def test_an_unknown_search_is_refused(search):
    with pytest.raises(BadInput, match="full or fast"):
        OMQ(search)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plus": True, "mix": False}, "plus without mix"),
        ({"smooth": False, "mix": False}, "neither"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, said):
    with pytest.raises(BadInput, match=said):
        OMQ(**options)


def test_channels_with_heavier_tails_get_the_bits():
    job = prepared(OMQ())
    layers = 0
    for name, form in mixed(job).items():
        kappa = kurtosis(job.model.get_submodule(name).smoothed_weight().flatten(1))
        bits = torch.tensor(form.bits)
        if job.report["mpq"]["groups"][name]:
            layers += 1
            assert (
                kappa[bits == 3].min()
                >= kappa[bits == 2].max()
                >= kappa[bits == 2].min()
                >= kappa[bits == 1].max()
            )
    assert layers > 3


@pytest.mark.parametrize(
    "name",
    ["mid_block.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "time_embedding.linear_2"],
)
def test_the_search_by_channel_is_the_search_over_whole_candidates(name):
    job = prepared()
    layer = job.model.get_submodule(name)
    inputs = layer_inputs(job, {name: layer}, PATCHES)[name]
    layer.set_smooth(divisors(layer, inputs))
    weight = layer.smoothed_weight().flatten(1)
    channel_errors = errors(layer, inputs)
    order = kurtosis(weight).argsort(descending=True)
    size = len(order) // 10
    whole: list[float] = []
    exact, rounded = rounded_rows(layer, inputs)
    for groups in range(6):
        bits = torch.full((len(order),), 2)
        bits[order[: groups * size]] += 1
        bits[order[len(order) - groups * size :]] -= 1
        form = Mixed(tuple(bits.tolist()), signed=False)
        grid = form.params(*SEARCHES["mse"](weight, form))
        whole.append(
            (exact @ weight.T - rounded @ form.decode(form.encode(weight, grid), grid).T)
            .square()
            .sum()
            .item()
        )
    assert whole[best_groups(channel_errors, order, 5)] == pytest.approx(min(whole), rel=1e-5)
    assert channel_errors[:, 1].sum().item() == pytest.approx(whole[0], rel=1e-4)
    assert weight_format(1, None).signed


def test_patches_are_rows_of_the_layers_own_product():
    job = prepared()
    layers = dict(quant_layers(job.model))
    for name in (
        "mid_block.resnets.0.conv1",
        "down_blocks.0.downsamplers.0.conv",
        "mid_block.attentions.0.to_q",
    ):
        layer = layers[name]
        outputs: list[torch.Tensor] = []
        hook = layer.register_forward_hook(
            lambda module, args, answer, outputs=outputs: outputs.append(answer.detach())
        )
        inputs = layer_inputs(job, {name: layer}, PATCHES)[name]
        hook.remove()
        answers = torch.cat(
            [
                each.flatten(2).mT.flatten(0, 1) if each.dim() == 4 else each.flatten(0, 1)
                for each in outputs
            ]
        )
        ours = torch.cat(inputs.patches) @ layer.weight.flatten(1).T + layer.bias
        apart = torch.cdist(ours[::37], answers, compute_mode="donot_use_mm_for_euclid_dist").amin(
            1
        )
        assert apart.max() / answers.norm(dim=1).mean() < 1e-4


def test_patches_are_kept_of_layers_that_are_weighed_and_the_plan_counts_them():
    job = prepared()
    layers = {
        name: layer for name, layer in quant_layers(job.model) if name not in job.adapter.ends()
    }
    one = next(iter(layers))
    whole = layer_inputs(job, layers, PATCHES)
    some = layer_inputs(job, layers, PATCHES, [one])
    assert [name for name in some if some[name].patches] == [one]
    assert all(torch.equal(some[name].hi, whole[name].hi) for name in layers)
    patches = [torch.cat(inputs.patches) for inputs in whole.values()]
    held = sum(patch.nbytes for patch in patches)
    assert patch_bytes(layers.values(), PATCHES) == pytest.approx(held, rel=0.01)


def test_smoothing_evens_inputs_and_weights_and_keeps_the_float_answer():
    job = prepared()
    before = run_call(job, job.calls[1])[0]
    name = "mid_block.resnets.0.conv1"
    inputs = layer_inputs(job, {name: job.model.get_submodule(name)}, PATCHES)[name]
    OMQ().run(job)
    layer = job.model.get_submodule(name)
    peaks = torch.maximum(inputs.hi.amax(0), -inputs.lo.amin(0)) / layer.smooth
    weights = layer.smoothed_weight().abs().amax((0, 2, 3))
    assert torch.allclose(peaks, weights, rtol=1e-4)
    set_precision(job.model, Precision.FLOAT)
    assert ((run_call(job, job.calls[1])[0] - before).norm() / before.norm()).item() < 1e-5
    assert not any(layer.smooth for layer in prepared(OMQ(smooth=False)).plan.layers.values())


def test_without_mixing_it_only_smooths():
    job = prepared(OMQ(mix=False))
    whole = prepared(OMQ())
    assert not mixed(job) and mixed(whole)
    smoothed = [name for name, layer in job.plan.layers.items() if layer.smooth]
    assert (
        smoothed == [name for name, layer in whole.plan.layers.items() if layer.smooth]
        and len(smoothed) > 20
    )


def test_layers_too_narrow_or_in_groups_are_not_mixed():
    assert mixed(prepared(OMQ(), group=16)) == {}
    job = prepared(OMQ(), weights=8)
    assert mixed(job) == {}
    assert all(len(job.model.get_submodule(name).weight) >= 10 for name in mixed(prepared(OMQ())))


def test_leaving_a_stage_out_is_the_ablation(monkeypatch):
    recipe = mpq.recipe(Settings())
    whole = quantized(recipe, monkeypatch)
    for stage in (OMQ, TRD, Distill):
        other = quantized(
            tuple(each for each in recipe if not isinstance(each, stage)), monkeypatch
        )
        assert ("mpq" in other.report) == (stage is not OMQ)
        assert ("Distill network" in other.report.get("losses", {})) == (stage is not Distill)
        ours = whole.model.state_dict()
        theirs = other.model.state_dict()
        assert ours.keys() != theirs.keys() or any(
            not torch.equal(ours[name], theirs[name]) for name in ours
        )


def test_sixteen_bits_change_nothing(monkeypatch):
    original = tiny.model("unet2d")
    result = quantized(mpq.recipe(Settings()), monkeypatch, weights=16, inputs=32)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(result.model(x, 750)[0], original(x, 750)[0])


def test_equal_seeds_give_equal_bits(monkeypatch):
    recipe = mpq.recipe(Settings())
    first, same, other = (
        quantized(recipe, monkeypatch, seed=seed).model.state_dict() for seed in (0, 0, 1)
    )
    assert first.keys() == same.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(
        first[name].shape != other[name].shape or not torch.equal(first[name], other[name])
        for name in first
    )


@pytest.mark.parametrize("plus", [False, True])
def test_end_to_end_through_the_checkpoint(monkeypatch, tmp_path, plus):
    recipe = tuple(
        replace(stage, plus=plus) if isinstance(stage, OMQ) else stage
        for stage in mpq.recipe(Settings())
    )
    result = quantized(recipe, monkeypatch)
    packed: dict[str, Packed] = dict(packed_layers(result.model))
    two = packed["mid_block.resnets.0.conv1"]
    assert isinstance(two.format, Mixed)
    assert two.weight.numel() == sum(-(-two.spec[0] * bits // 8) for bits in two.format.bits)
    request = sampling.Request(steps=4, seeds=(0, 1))
    before = sampling.images(result.pipe, request)
    result.save(tmp_path / "mixed")
    assert (sampling.images(lowtide.load(tmp_path / "mixed"), request) == before).all()
