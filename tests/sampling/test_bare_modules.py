"""Bare modules: quantized from an example and a scheduler, saved, loaded by a factory."""

import shutil

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from bare_denoisers import Labelled, Tokens
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler

import lowtide
from lowtide import runtime, sampling
from lowtide.checkpoint.facts import digest_of_parts
from lowtide.checkpoint.verification import problems_of
from lowtide.errors import BadInput
from lowtide.sampling.pipelines import ModulePipeline, UnconditionalPipeline

OPTIONS = {"steps": 3, "images": 4}
LEARNING = OPTIONS | {"iters": 2, "calibration_steps": 2}


def example(*shape, labels=False):
    inputs = {"x": torch.zeros(1, *shape), "timestep": torch.zeros(1)}
    rows = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    return inputs | ({"label": rows} if labels else {})


def quantized(kind, method, *shape):
    torch.manual_seed(0)
    inputs = example(*shape, labels=kind is Labelled)
    options = OPTIONS if method == "minmax" else LEARNING
    return lowtide.quantize(
        kind().eval(), method=method, example=inputs, scheduler=DDIMScheduler(), **options
    )


def draw(pipe, steps=3):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe(2, generator=generators, num_inference_steps=steps, output_type="np").images


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    result = quantized(Tokens, "best", 5, 4)
    return result, result.save(tmp_path_factory.mktemp("bare") / "packed")


@pytest.mark.parametrize(
    ("kind", "method", "shape"),
    [
        (Tokens, "minmax", (4,)),
        (Tokens, "tfmq", (2, 3, 5, 4)),
        (Labelled, "best", (5, 4)),
        (Labelled, "minmax", (2, 3, 5, 4)),
    ],
)
def test_samples_of_any_rank_are_saved_and_loaded_bit_for_bit(kind, method, shape, tmp_path):
    result = quantized(kind, method, *shape)
    expected = draw(result.pipe)
    again = lowtide.load(result.save(tmp_path / "packed"), factory=kind)
    assert isinstance(again, ModulePipeline) and again.shape == shape
    assert np.array_equal(draw(again), expected)
    assert problems_of(tmp_path / "packed") == []


def test_a_norm_with_a_cast_weight_runs_fused_as_layer_by_layer(packed):
    pipe = packed[0].pipe
    assert runtime.is_fused(pipe.unet)
    fused = draw(pipe)
    with lowtide.unfused(pipe):
        plain = draw(pipe)
    assert np.linalg.norm(fused - plain) < 1e-4 * np.linalg.norm(plain)


def test_a_loaded_module_runs_another_schedule(packed):
    result, folder = packed
    again = lowtide.load(folder, factory=Tokens)
    with pytest.warns(UserWarning, match="calibrated for 3 timesteps of another schedule"):
        assert np.isfinite(draw(again, steps=5)).all()
    saved = lowtide.save(again, folder.with_name("again"))
    assert np.array_equal(draw(lowtide.load(saved, factory=Tokens)), draw(result.pipe))


def test_each_image_has_the_condition_of_its_seed():
    pipe = sampling.as_pipeline(Labelled(), DDIMScheduler(), example=example(5, 4, labels=True))
    request = sampling.Request(steps=2, seeds=(3, 4, 6))
    moment = next(sampling.trajectory(pipe, request))
    rows = example(5, 4, labels=True)["label"]
    assert torch.equal(moment.arguments["label"], rows[[0, 1, 0]])


def test_a_folder_of_a_module_needs_its_code(packed):
    _, folder = packed
    with pytest.raises(BadInput, match=r"found a bare Tokens.*load it with .*factory=Tokens"):
        lowtide.load(folder)
    with pytest.raises(BadInput, match=r"makes a bare_denoisers\.Labelled"):
        lowtide.load(folder, factory=Labelled)
    with pytest.raises(BadInput, match="found factory Tokens; expected what makes the module"):
        lowtide.load(folder, factory=Tokens())


def test_a_factory_for_a_pipeline_is_refused(tmp_path):
    tiny_pipelines.ddim(tmp_path).save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput, match="found no bare module in model"):
        lowtide.load(tmp_path / "model", factory=Tokens)


def test_altered_bytes_are_found(packed, tmp_path):
    copy = shutil.copytree(packed[1], tmp_path / "copy")
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match="altered since it was saved"):
        lowtide.load(copy, factory=Tokens)
    assert any("altered since it was saved" in problem for problem in problems_of(copy))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "found an example with nothing for a Tokens; expected tensors by name: x, timestep"),
        ({"x": torch.zeros(1, 4)}, "found an example with x"),
        ({"x": torch.zeros(1, 4), "timestep": 3}, "found an example with x, timestep"),
        (example(4) | {"text": torch.zeros(1)}, "found text in the example; .* check the spelling"),
    ],
)
def test_a_wrong_example_is_one_sentence(inputs, message):
    with pytest.raises(BadInput, match=message):
        lowtide.quantize(Tokens(), example=inputs, scheduler=DDIMScheduler())


def test_a_bare_module_needs_scheduler_and_example():
    for options in ({}, {"scheduler": DDIMScheduler()}, {"example": example(4)}):
        with pytest.raises(BadInput, match=r"pass the pipeline, or scheduler=.* and example="):
            lowtide.quantize(Tokens(), **options)


def test_a_pipeline_has_its_own_scheduler_and_arguments(tmp_path):
    pipe = tiny_pipelines.ddim(tmp_path)
    with pytest.raises(BadInput, match="found a scheduler with DDIMPipeline"):
        lowtide.quantize(pipe, scheduler=DDIMScheduler())
    with pytest.raises(BadInput, match="found example with DDIMPipeline"):
        lowtide.quantize(pipe, example=example(4))


def test_a_unet_takes_any_scheduler():
    model = tiny.model("unet2d")
    scheduler = DPMSolverMultistepScheduler()
    assert isinstance(sampling.as_pipeline(model, scheduler), UnconditionalPipeline)
    assert isinstance(sampling.as_pipeline(model, DDIMScheduler()), DDIMPipeline)


def test_another_condition_is_another_run():
    rows = example(4, labels=True)
    digests = [
        digest_of_parts(
            sampling.as_pipeline(Labelled(), DDIMScheduler(), example=rows | {"label": label})
        )
        for label in (rows["label"], rows["label"] + 1)
    ]
    assert digests[0] != digests[1]


class Renamed(Tokens):
    """A denoiser whose time has another name."""

    def forward(self, x, time):
        return super().forward(x, time)


def test_a_timestep_of_another_name_is_one_sentence():
    inputs = {"x": torch.zeros(1, 4), "time": torch.zeros(1)}
    with pytest.raises(BadInput, match="found Renamed, whose forward takes x, time; expected a de"):
        lowtide.quantize(Renamed(), example=inputs, scheduler=DDIMScheduler())


class OwnScheduler(DDIMScheduler):
    """A scheduler that diffusers does not know."""


def test_a_scheduler_that_nobody_can_load_is_one_sentence(tmp_path):
    result = lowtide.quantize(
        Tokens(), method="minmax", example=example(4), scheduler=OwnScheduler(), **OPTIONS
    )
    with pytest.raises(BadInput, match="found a OwnScheduler, which is no scheduler of diffusers"):
        result.save(tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []
