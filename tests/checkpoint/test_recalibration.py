"""Recalibration moves input ranges to what a LoRA sends, and leaves weights and codes alone."""

import copy

import lora_files
import pytest
import tiny
import tiny_pipelines
import torch
from safetensors.torch import save_file

import lowtide
from lowtide import sampling
from lowtide.checkpoint.recalibration import recalibrate_to_folder
from lowtide.errors import BadInput
from lowtide.evaluation import compared_models
from lowtide.models import answer_of
from lowtide.nn.swap import find_clock
from lowtide.report import text
from lowtide.workflows import to_folder

pytest.importorskip("peft")

REQUEST = lowtide.Request(steps=2, seeds=(1, 2), size=8, prompts=("a", "b"))


def error(float_pipe, packed_pipe) -> float:
    """Of the packed model's answers on the float model's trajectory, relative L2."""
    wrong = 0.0
    size = 0.0
    for moment in sampling.trajectory(float_pipe, REQUEST):
        with torch.no_grad():
            answer = answer_of(packed_pipe.unet(**moment.arguments))
        wrong += float((answer - moment.eps).square().sum())
        size += float(moment.eps.square().sum())
    return (wrong / size) ** 0.5


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """A float pipeline and the packed one, both with a LoRA that is four times too strong."""
    folder = tmp_path_factory.mktemp("sd")
    float_pipe = tiny_pipelines.stable_diffusion(folder)
    quantized = lowtide.quantize(
        copy.deepcopy(float_pipe),
        method="ptqd",
        weights=8,
        iters=1,
        range_iters=1,
        steps=2,
        images=2,
        size=8,
        prompts=("a", "b"),
        calibration_steps=2,
    )
    factors = lora_files.random_lora(tiny.model("unet-text"), lora_files.ATTENTION)
    for pipe in (float_pipe, quantized.pipe):
        lora_files.load(pipe, lora_files.peft_layout(factors))
        pipe.set_adapters(["style"], [4.0])
    return float_pipe, quantized.pipe


def test_ranges_fit_the_lora_and_weights_stay(pipes):
    float_pipe, packed_pipe = pipes
    unet = packed_pipe.unet
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    far = error(float_pipe, packed_pipe)
    result = lowtide.recalibrate(packed_pipe, request=REQUEST)
    near = error(float_pipe, packed_pipe)
    assert near < 0.7 * far
    assert result.report["widest"] > 1.5
    assert result.report["bias"] == "kept"
    after = unet.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"lowtide_clock.scale", "lowtide_clock.zero"}
    # With the float model, the mean error of each step and channel goes, too.
    result = lowtide.recalibrate(packed_pipe, reference=float_pipe, request=REQUEST)
    assert result.report["bias"] == "measured again"
    assert error(float_pipe, packed_pipe) < near
    after = unet.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {"lowtide_clock.scale", "lowtide_clock.zero", "lowtide_correction.bias"}
    assert changed == expected
    assert find_clock(unet).scale.isfinite().all()


def test_what_is_not_packed_is_one_sentence(pipes):
    float_pipe, packed_pipe = pipes
    with pytest.raises(BadInput, match="found no model that lowtide packed"):
        lowtide.recalibrate(float_pipe, request=REQUEST)
    with pytest.raises(BadInput, match="found a packed model as reference"):
        lowtide.recalibrate(packed_pipe, reference=packed_pipe, request=REQUEST)


def test_from_files_to_folders(tmp_path):
    """The commands: a LoRA fused before, and one fused after with ranges fitted to it."""
    factors = lora_files.random_lora(tiny.model("unet-text"), lora_files.ATTENTION)
    file = tmp_path / "style.safetensors"
    save_file(lora_files.kohya_layout(factors), file)
    float_pipe = tiny_pipelines.stable_diffusion(tmp_path)
    float_pipe.save_pretrained(tmp_path / "float")
    lora_files.load(float_pipe, lora_files.peft_layout(factors))
    options = {"weights": 8, "steps": 2, "images": 2, "size": 8, "prompts": ("a", "b")}
    source = str(tmp_path / "float")
    to_folder.quantize_to_folder(source, tmp_path / "first", "minmax", options, str(file))
    to_folder.quantize_to_folder(source, tmp_path / "plain", "minmax", options)
    report = recalibrate_to_folder(tmp_path / "plain", tmp_path / "after", lora=str(file))
    assert len(text.recalibrated(report)) == 4
    errors = {}
    for name in ("first", "after", "plain"):
        model = compared_models.load(tmp_path / name)
        errors[name] = error(float_pipe, model.pipe)
        reference = compared_models.reference_of(model, None)
        is_the_reference = error(float_pipe, reference.pipe) < 1e-6
        assert is_the_reference == (name != "plain")
    assert max(errors["first"], errors["after"]) < 0.2 * errors["plain"]
    assert any(
        ".side.down." in name
        for name in compared_models.load(tmp_path / "after").denoiser.state_dict()
    )


def test_a_lora_that_cannot_be_read_is_one_sentence(pipes, tmp_path):
    _, packed_pipe = pipes
    with pytest.raises(BadInput, match="found no file"):
        lowtide.recalibrate(packed_pipe, lora=tmp_path / "nothing", request=REQUEST)
    (tmp_path / "damaged.safetensors").write_bytes(b"no LoRA")
    with pytest.raises(BadInput, match="unreadable as a LoRA"):
        lowtide.recalibrate(packed_pipe, lora=tmp_path / "damaged.safetensors", request=REQUEST)
    digits = lowtide.load("zoo:digits")
    with pytest.raises(BadInput, match="found a LoRA for a DDIMPipeline"):
        lowtide.quantize(digits, fuse_lora=tmp_path / "nothing")
