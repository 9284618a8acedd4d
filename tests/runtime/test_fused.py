"""Fused equals layer by layer: every pipeline and method, and what a program does not follow.

One value that rounds the other way changes everything after it a little, as the order of a sum may
decide it. So a call is close to the last digits, or as far as one rounding apart.
"""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tiny_pipelines
import torch
from fused_networks import ONE_ROUNDING_APART, ROUNDED_ALIKE, distance, needs_library
from torch import nn

import lowtide
from lowtide import runtime, sampling
from lowtide.kernels import native_library
from lowtide.methods import relevant_options
from lowtide.nn.swap import packed_layers
from lowtide.runtime.attention_step import AttentionStep

QUICK = {"steps": 3, "images": 2, "calibration_steps": 2, "iters": 4, "batch": 2}

pytestmark = needs_library


class Calls:
    """The calls of a denoiser while a pipeline draws, and the pipeline."""

    def __init__(self, name: str, folder, method: str = "minmax", **options):
        self.pipe = tiny_pipelines.PIPELINES[name](folder)
        request = tiny_pipelines.request_fields(name)
        relevant = relevant_options(method, QUICK | request | options)
        self.model = lowtide.quantize(self.pipe, method=method, **relevant).model
        self.request = sampling.Request(steps=3, seeds=(5, 6), batch=2, **request)
        self.calls: list[tuple[tuple, dict]] = []
        self.images = self.draw(self.request)

    def draw(self, request: sampling.Request) -> np.ndarray:
        """Draw images and keep the calls."""
        hook = self.model.register_forward_pre_hook(
            lambda model, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
        )
        images = sampling.images(self.pipe, request)
        hook.remove()
        return images

    def draw_one_by_one(self) -> "Calls":
        """Small calls, so that in some of them every value is rounded alike."""
        self.draw(replace(self.request, seeds=(1, 2, 3, 4), batch=1))
        return self

    @torch.no_grad()
    def answers(self) -> list[torch.Tensor]:
        return [answer(self.model(*args, **kwargs)) for args, kwargs in self.calls]

    def plain_answers(self) -> list[torch.Tensor]:
        with lowtide.unfused(self.model):
            return self.answers()


def answer(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


METHODS = ["minmax", "tfmq", "temporal_cache", "tcaq", "mpq", "best"]
# Every method on ddim, and one of them on each other pipeline.
OTHERS = sorted(set(tiny_pipelines.PIPELINES) - {"ddim"})
PAIRS = [("ddim", method) for method in METHODS]
PAIRS += [(name, METHODS[place % len(METHODS)]) for place, name in enumerate(OTHERS)]


def check(calls: Calls) -> None:
    answers = zip(calls.answers(), calls.plain_answers(), strict=True)
    distances = [distance(*pair) for pair in answers]
    assert min(distances) < ROUNDED_ALIKE, distances
    assert max(distances) < ONE_ROUNDING_APART, distances


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_each_pipeline_and_method(name, method, tmp_path):
    calls = Calls(name, tmp_path, method).draw_one_by_one()
    check(calls)
    assert runtime.explain(calls.model)["native"] > 30


def test_attention_reads_and_gives_codes(tmp_path):
    """The layers before it round its operands; it rounds the input of the layer after it."""
    calls = Calls("dit", tmp_path)
    fused = runtime.fused_forward(calls.model)
    assert fused is not None
    program = next(iter(fused.prepared().store.programs.values()))
    attentions = [step for step in program.lowered.steps if isinstance(step, AttentionStep)]
    assert len(attentions) == len(calls.model.transformer_blocks)
    for step in attentions:
        operands = (step.query, step.key, step.value)
        assert [view.meta.dtype for view in operands] == [torch.uint8] * 3
        assert step.rounding is not None


@pytest.mark.parametrize("weights", [2, 3, 6, 8])
def test_other_bits(weights, tmp_path):
    check(Calls("ddim", tmp_path, weights=weights, inputs=8).draw_one_by_one())


def test_groups_and_weights_alone(tmp_path):
    grouped = Calls("ddim", tmp_path / "g", weights=4, group=16)
    assert distance(grouped.answers()[0], grouped.plain_answers()[0]) < ONE_ROUNDING_APART
    alone = Calls("ddim", tmp_path / "a", weights=4, inputs=32)
    assert distance(alone.answers()[0], alone.plain_answers()[0]) < ROUNDED_ALIKE
    kernels = {runtime.kernel_of(layer) for _, layer in packed_layers(alone.model)}
    assert all(each.endswith("its inputs are in float") for each in kernels)
    assert all(each.startswith("native") for each in kernels)


@pytest.fixture(scope="module")
def ddim(tmp_path_factory) -> Calls:
    return Calls("ddim", tmp_path_factory.mktemp("ddim"))


def test_loading_gives_a_fused_network(ddim, tmp_path):
    lowtide.save(ddim.pipe, tmp_path / "packed")
    loaded = lowtide.load(tmp_path / "packed")
    assert runtime.is_fused(loaded.unet)
    assert np.array_equal(sampling.images(loaded, ddim.request), ddim.images)
    by_diffusers = type(ddim.pipe).from_pretrained(tmp_path / "packed")
    assert runtime.is_fused(by_diffusers.unet)
    assert not runtime.is_fused(lowtide.load(tmp_path / "packed", fused=False).unet)


def test_cached_features_come_from_a_table(tmp_path):
    calls = Calls("ddim", tmp_path, "temporal_cache")
    assert calls.model.hf_quantizer.plan.cached
    calls.answers()
    in_torch = runtime.explain(calls.model)["torch"]
    assert not [name for name in in_torch if "time_emb" in name and "linear" not in name]


def test_other_shapes_get_other_programs(ddim):
    timestep = ddim.calls[0][0][1]
    for batch, size in ((1, 8), (3, 8), (1, 16), (2, 12)):
        x = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            fused = answer(ddim.model(x, timestep))
            with lowtide.unfused(ddim.model):
                plain = answer(ddim.model(x, timestep))
        assert distance(fused, plain) < ONE_ROUNDING_APART


def test_two_threads_give_the_same_bits(ddim):
    expected = ddim.answers()
    torch.set_num_threads(2)
    try:
        assert all(map(torch.equal, ddim.answers(), expected))
    finally:
        torch.set_num_threads(1)


def test_two_python_threads_take_turns(ddim):
    args, kwargs = ddim.calls[0]
    samples = [args[0] * factor for factor in (1.0, 0.5, 2.0, -1.0)]

    @torch.no_grad()
    def draw(sample: torch.Tensor) -> torch.Tensor:
        return answer(ddim.model(sample, *args[1:], **kwargs))

    expected = [draw(sample) for sample in samples]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(draw, samples), expected))


def told(calls: Calls) -> list[str]:
    """What a call warns of."""
    runtime.fused_forward(calls.model).told.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = calls.answers()
    expected = calls.plain_answers()
    assert max(map(distance, answers, expected)) < ONE_ROUNDING_APART
    return [str(each.message) for each in caught]


def test_nan_gives_the_plain_answer_and_one_sentence(ddim):
    args, _ = ddim.calls[0]
    x = args[0].clone()
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad(), pytest.warns(UserWarning, match="a value in it is not a number"):
        runtime.fused_forward(ddim.model).told.clear()
        fused = answer(ddim.model(x, args[1]))
    with torch.no_grad(), lowtide.unfused(ddim.model):
        assert torch.equal(fused.isnan(), answer(ddim.model(x, args[1])).isnan())
    assert fused.isnan().any()


def test_infinity_is_the_last_code(ddim):
    args, _ = ddim.calls[0]
    x = args[0].clone()
    x[0, 0, 0, 0] = 1e30
    with torch.no_grad():
        fused = answer(ddim.model(x, args[1]))
        with lowtide.unfused(ddim.model):
            plain = answer(ddim.model(x, args[1]))
    assert torch.equal(fused.isfinite(), plain.isfinite())


def test_hooks_on_inner_modules_fire(ddim):
    fired: list[str] = []
    hook = ddim.model.mid_block.register_forward_hook(lambda *_: fired.append("mid"))
    try:
        assert told(ddim) == [
            "UNet2DModel runs layer by layer: a UNetMidBlock2D inside it has a hook."
        ]
    finally:
        hook.remove()
    assert fired
    assert told(ddim) == []


def test_a_replaced_layer_runs(ddim):
    before = ddim.model.conv_out
    ddim.model.conv_out = nn.Sequential(before, nn.Tanh())
    try:
        assert told(ddim) == ["UNet2DModel runs layer by layer: its modules were changed."]
    finally:
        ddim.model.conv_out = before


def test_gradients_are_left_to_the_plain_layers(ddim):
    args, _ = ddim.calls[0]
    runtime.fused_forward(ddim.model).told.clear()
    with pytest.warns(UserWarning, match="gradients are wanted"):
        ddim.model(args[0].clone().requires_grad_(), args[1])


def test_a_copy_has_programs_of_its_own(ddim):
    twin = copy.deepcopy(ddim.model)
    assert runtime.fused_forward(twin).root is twin
    args, kwargs = ddim.calls[0]
    with torch.no_grad():
        expected = answer(ddim.model(*args, **kwargs))
        assert torch.equal(answer(twin(*args, **kwargs)), expected)
        twin.conv_norm_out.weight.mul_(2)
        changed = answer(twin(*args, **kwargs))
        assert not torch.equal(changed, expected)
        assert torch.equal(answer(ddim.model(*args, **kwargs)), expected)


def test_changed_codes_and_norms_are_seen(ddim):
    model = copy.deepcopy(ddim.model)
    args, kwargs = ddim.calls[0]
    with torch.no_grad():
        before = answer(model(*args, **kwargs))
        layer = model.mid_block.resnets[0].conv1
        layer.load_state_dict(layer.state_dict() | {"weight": layer.codes().flip(0)})
        after = answer(model(*args, **kwargs))
        with lowtide.unfused(model):
            plain = answer(model(*args, **kwargs))
    assert distance(before, plain) > 1e-4
    assert distance(after, plain) < ONE_ROUNDING_APART


def test_changed_float_layers_are_seen(tmp_path):
    """The time embedding gives features that are kept; a norm may get another parameter."""
    calls = Calls("ddim", tmp_path)
    model = calls.model
    before = calls.answers()[0]
    with torch.no_grad():
        model.time_embedding.linear_2.bias.add_(1.0)
    moved = calls.answers()[0]
    assert distance(moved, before) > 1e-3
    assert distance(moved, calls.plain_answers()[0]) < ONE_ROUNDING_APART
    model.conv_norm_out.weight = nn.Parameter(2 * model.conv_norm_out.weight, requires_grad=False)
    doubled = calls.answers()[0]
    assert distance(doubled, moved) > 1e-3
    assert distance(doubled, calls.plain_answers()[0]) < ONE_ROUNDING_APART


def test_a_compiled_model_runs_the_plain_layers(ddim):
    args, _ = ddim.calls[0]
    compiled = torch.compile(ddim.model, backend="eager")
    with torch.no_grad():
        found = answer(compiled(args[0], args[1]))
        with lowtide.unfused(ddim.model):
            assert distance(found, answer(ddim.model(*args))) < ONE_ROUNDING_APART


def test_without_the_library_it_says_so(ddim, monkeypatch):
    for _, layer in packed_layers(ddim.model):
        layer.hold_codes()
    missing = native_library.Native(None, "lowtide was installed without a C++ compiler")
    monkeypatch.setattr(native_library, "native", lambda: missing)
    assert told(ddim) == [
        "UNet2DModel runs layer by layer: lowtide was installed without a C++ compiler; "
        "oneDNN runs its products."
    ]


def test_an_empty_batch_fails_as_the_plain_layers_do(ddim):
    args, _ = ddim.calls[0]
    with torch.no_grad(), pytest.raises(RuntimeError, match="reshape tensor of 0 elements"):
        ddim.model(args[0][:0], args[1])
