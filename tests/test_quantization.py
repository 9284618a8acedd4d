"""The main path: every pipeline quantized, saved, loaded; resumed to the same bits; bad input."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from torch import nn

import lowtide
from lowtide import quantization, sampling
from lowtide.checkpoint import facts
from lowtide.errors import BadInput
from lowtide.formats import packed_bytes
from lowtide.methods import relevant_options
from lowtide.models import adapt
from lowtide.nn.swap import packed_layers
from lowtide.stages import base
from lowtide.workflows import sampled_folder, to_folder

QUICK = {"steps": 3, "images": 2, "calibration_steps": 2, "iters": 4, "batch": 2}


def quantized(pipe, method="tfmq", folder=None, **options):
    relevant = relevant_options(method, QUICK | options)
    return lowtide.quantize(pipe, method=method, folder=folder, **relevant)


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_each_pipeline_end_to_end(name, tmp_path):
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    options = tiny_pipelines.request_fields(name)
    request = sampling.Request(steps=3, seeds=(5, 6), batch=2, **options)
    original = sampling.images(pipe, request)
    result = quantized(pipe, **options)
    layers = dict(packed_layers(result.model))
    assert len(layers) == len(adapt(float_twin(result.model)).layers())
    assert all(layer.format.bits in (4, 8) for layer in layers.values())
    drawn = sampling.images(pipe, request)
    assert 0 < np.linalg.norm(drawn - original) / np.linalg.norm(original) < 0.5
    folder = result.save(tmp_path / "packed")
    again = sampling.images(DiffusionPipeline.from_pretrained(folder), request)
    assert np.array_equal(again, drawn)


def float_twin(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return type(model).from_config(model.config)


class ByHand:
    """A processor that computes attention without the one function that lowtide replaces."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states + attn.to_out[0](
            attn.to_v(attn.to_k(attn.to_q(hidden_states.flatten(2).mT)))
        ).mT.reshape(hidden_states.shape)


def test_attention_out_of_reach_stays_in_float_and_the_ranges_of_the_rest_survive(tmp_path):
    model = tiny.model("unet2d")
    model.down_blocks[1].attentions[0].set_processor(ByHand())
    result = quantized(sampling.as_pipeline(model))
    assert "attention of down_blocks.1.attentions.0" in result.plan.left
    again = UNet2DModel.from_pretrained(result.save(tmp_path / "x") / "unet")
    again.down_blocks[1].attentions[0].set_processor(ByHand())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(again(x, 666).sample, result.model(x, 666).sample)


def test_a_bare_model_loads_through_its_own_class(tmp_path):
    result = quantized(tiny.model("unet2d"))
    result.save(tmp_path / "packed")
    model = UNet2DModel.from_pretrained(tmp_path / "packed" / "unet")
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(model(x, 666).sample, result.model(x, 666).sample)


def test_a_model_by_its_name(tmp_path):
    tiny_pipelines.ddim(tmp_path).save_pretrained(tmp_path / "float")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "float")
    by_name = quantized(tmp_path / "float", method="minmax").model.state_dict()
    by_pipeline = quantized(pipe, method="minmax").model.state_dict()
    assert all(torch.equal(by_name[name], by_pipeline[name]) for name in by_pipeline)
    with pytest.raises(BadInput, match="no folder"):
        quantized("not-there")


def test_sixteen_bits_changes_nothing():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    request = sampling.Request(steps=3, seeds=(1, 2))
    original = sampling.images(pipe, request)
    quantized(pipe, weights=16, inputs=32)
    assert np.array_equal(sampling.images(pipe, request), original)


@pytest.mark.parametrize(("weights", "inputs"), [(4, 32), (32, 8), (8, 8), (2, 6), (3, 16), (1, 8)])
def test_bits_of_the_papers(weights, inputs, tmp_path):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    result = quantized(pipe, method="minmax", weights=weights, inputs=inputs)
    request = sampling.Request(steps=3, seeds=(1,))
    drawn = sampling.images(pipe, request)
    assert np.array_equal(
        sampling.images(lowtide.load(result.save(tmp_path / "x")), request), drawn
    )


def test_groups_and_paper_profile(tmp_path):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    result = quantized(pipe, method="tfmq", group=16, profile="paper")
    assert "conv_in" in result.plan.left
    assert "attention" in result.plan.left
    assert "conv_in" not in dict(packed_layers(result.model))
    request = sampling.Request(steps=3, seeds=(1,))
    drawn = sampling.images(pipe, request)
    assert np.array_equal(
        sampling.images(lowtide.load(result.save(tmp_path / "x")), request), drawn
    )


def test_codes_take_exactly_their_bits(tmp_path):
    result = quantized(sampling.as_pipeline(tiny.model("unet2d")), method="minmax")
    for name, layer in packed_layers(result.model):
        rows = layer.tables()[0].shape[0]
        assert layer.weight.numel() == rows * packed_bytes(
            layer.spec[0], 8 if name in ("conv_in", "conv_out") else 4
        )


def test_the_file_is_within_five_percent_of_bits_times_parameters_and_tables(tmp_path):
    pipe = sampling.load_pipeline("zoo:digits")
    adapter = adapt(sampling.load_pipeline("zoo:digits").unet)
    result = quantized(pipe, steps=50, iters=1)
    account = result.report["account"]
    expected = facts.ideal_bytes(adapter, result.plan) + account["scales"] + account["tables"]
    assert account["total"] == pytest.approx(expected, rel=1e-3)
    assert 1 <= facts.on_disk(result.save(tmp_path / "x")) / expected < 1.05


def test_another_version_of_lowtide_takes_up_nothing(tmp_path, monkeypatch):
    """Units of other code are not mixed with these: the run starts again in its own folder."""
    for version in ("one", "one", "other"):
        monkeypatch.setattr(base, "code_hash", lambda version=version: version)
        quantized(sampling.as_pipeline(tiny.model("unet2d")), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_source_is_every_file_of_the_package(monkeypatch):
    read = Path.read_bytes
    paths = []
    monkeypatch.setattr(Path, "read_bytes", lambda self: (paths.append(self), read(self))[1])
    assert base.code_hash.__wrapped__() == base.code_hash()
    assert {Path(lowtide.__file__), Path(base.__file__), Path(quantization.__file__)} <= set(paths)


def test_a_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    whole = quantized(sampling.as_pipeline(tiny.model("unet2d")))
    from lowtide.stages.reconstruct import Learner

    search = Learner.search
    units = []

    def dying(self, loss):
        units.append(self.unit.name)
        if len(units) == 5:
            raise KeyboardInterrupt
        return search(self, loss)

    monkeypatch.setattr(Learner, "search", dying)
    with pytest.raises(KeyboardInterrupt):
        quantized(sampling.as_pipeline(tiny.model("unet2d")), folder=tmp_path)
    first = list(units)
    resumed = quantized(sampling.as_pipeline(tiny.model("unet2d")), folder=tmp_path)
    assert not set(first[:4]) & set(units[5:])
    ours = resumed.model.state_dict()
    theirs = whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_learnt_ranges_are_recorded_too(tmp_path, monkeypatch):
    from lowtide.stages.learn_ranges import RangeLearner

    options = {"inputs": 4, "range_iters": 3, "folder": tmp_path}
    whole = quantized(sampling.as_pipeline(tiny.model("unet2d")), **options).model.state_dict()
    monkeypatch.setattr(RangeLearner, "search", None)
    again = quantized(sampling.as_pipeline(tiny.model("unet2d")), **options).model.state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("name", "dtype"), [("ddim", torch.float16), ("dit", torch.bfloat16), ("sdxl", torch.bfloat16)]
)
def test_a_model_in_half_precision_stays_in_it(name, dtype, tmp_path):
    tiny_pipelines.PIPELINES[name](tmp_path).save_pretrained(tmp_path / "half")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "half", dtype=dtype)
    options = tiny_pipelines.request_fields(name)
    request = sampling.Request(steps=3, seeds=(5,), **options)
    result = quantized(pipe, method="best", **options)
    drawn = sampling.images(pipe, request)
    assert np.isfinite(drawn).all()
    assert {each.dtype for each in result.model.parameters() if each.is_floating_point()} == {dtype}
    loaded = lowtide.load(result.save(tmp_path / "packed"), dtype=dtype)
    assert np.array_equal(sampling.images(loaded, request), drawn)


def test_bfloat16_keeps_scales_in_float32(tmp_path):
    result = quantized(sampling.as_pipeline(tiny.model("unet2d")))
    folder = result.save(tmp_path / "x")
    state = lowtide.load(folder, dtype=torch.bfloat16).unet.state_dict()
    saved = result.model.state_dict()
    scales = [name for name in state if name.endswith(("scale", "grid"))]
    assert len(scales) > 20
    assert all(
        layer.to(torch.bfloat16).tables()[0].dtype == torch.float32
        for _, layer in packed_layers(result.model)
    )
    assert all(torch.equal(state[name], saved[name]) for name in scales)
    assert state["conv_in.bias"].dtype == torch.bfloat16


def test_all_zero_channels_and_layers_survive():
    model = tiny.model("unet2d")
    with torch.no_grad():
        model.mid_block.resnets[0].conv1.weight[3] = 0
        model.mid_block.resnets[1].conv2.weight.zero_()
    pipe = sampling.as_pipeline(model)
    quantized(pipe)
    assert np.isfinite(sampling.images(pipe, sampling.Request(steps=3, seeds=(1,)))).all()


class Denoiser(nn.Module):
    """A model without diffusers, with blocks of its own, called (sample, timestep)."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 16))
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.leave = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, sample, timestep):
        features = self.time(
            torch.as_tensor(timestep, device=sample.device).reshape(-1, 1).expand(len(sample), 1)
            / 1000
        )
        x = self.enter(sample)
        for block in self.blocks:
            x = block(x, features)
        return self.leave(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.shift = nn.Linear(16, 16)

    def forward(self, x, features):
        return x + self.second(torch.relu(self.first(x) + self.shift(features)[:, :, None, None]))


def test_any_denoiser_called_sample_timestep():
    torch.manual_seed(0)
    model = Denoiser().eval()
    x = torch.randn(4, 3, 8, 8)
    t = torch.full((4,), 666)
    original = model(x, t).detach()
    pipe = sampling.as_pipeline(model, DDIMScheduler(), (3, 8, 8))
    result = quantized(pipe)
    assert len(dict(packed_layers(result.model))) == 10
    assert 0 < (result.model(x, t) - original).norm() / original.norm() < 0.1
    assert sampling.images(pipe, sampling.Request(steps=3, seeds=(1, 2))).shape == (2, 8, 8, 3)
    (unit,) = adapt(
        Denoiser(), {"sample": torch.zeros(2, 3, 8, 8), "timestep": torch.zeros(2)}
    ).temporal()
    assert unit.reads == ("timestep",)
    assert unit.features == ("blocks.0.shift", "blocks.1.shift")


def test_a_step_count_it_was_not_calibrated_for(tmp_path):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    folder = quantized(pipe, "temporal_cache", only_schedule=True).save(tmp_path / "x")
    with pytest.raises(BadInput, match=r"found 7 steps; expected the 3.* without --only-sch"):
        sampled_folder.sample_to_folder(
            str(folder),
            tmp_path / "images",
            sampling.Request(steps=7),
        )
    with pytest.raises(BadInput, match=r"found timestep .* without --only-schedule"):
        sampling.images(lowtide.load(folder), sampling.Request(steps=7))
    assert not (tmp_path / "images").exists()


def test_a_model_that_is_quantized_already():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    quantized(pipe, method="minmax")
    with pytest.raises(BadInput, match="quantized already"):
        quantized(pipe)


def test_a_bare_module_that_is_quantized_already():
    pipe = sampling.as_pipeline(Denoiser().eval(), DDIMScheduler(), (3, 8, 8))
    quantized(pipe, method="minmax")
    with pytest.raises(BadInput, match="quantized already"):
        quantized(pipe)


def test_a_model_that_a_failed_quantization_left_half_way(monkeypatch):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    monkeypatch.setattr("lowtide.stages.fit_weights.FitWeights.run", lambda self, job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantized(pipe)
    monkeypatch.undo()
    with pytest.raises(
        BadInput,
        match="which failed left half-way; expected a float model; load the original again",
    ):
        quantized(pipe)


def test_more_steps_than_the_model_knows(tmp_path):
    tiny_pipelines.ddim(tmp_path).save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput, match="found 2000 steps; expected at most 1000"):
        to_folder.quantize_to_folder(
            str(tmp_path / "model"), tmp_path / "out", "tfmq", QUICK | {"steps": 2000}
        )


def test_bfloat16_where_diffusers_makes_no_pictures_of_it(tmp_path):
    with pytest.raises(BadInput, match="found a DDIMPipeline in bfloat16"):
        quantized(tiny_pipelines.ddim(tmp_path).to(torch.bfloat16))


def test_nan_weights_are_named():
    model = tiny.model("unet2d")
    with torch.no_grad():
        model.conv_in.weight[0] = float("nan")
    with pytest.raises(BadInput, match=r"conv_in\.weight"):
        quantized(sampling.as_pipeline(model))


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    result = quantized(sampling.as_pipeline(tiny.model("unet2d")), method="minmax")
    folder = result.save(tmp_path / "x")
    before = sorted(path.name for path in tmp_path.iterdir())

    def dying(fresh):
        (fresh / "half").write_text("written")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result.pipe, "save_pretrained", dying)
    with pytest.raises(BadInput, match="disk full"):
        result.save(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert isinstance(lowtide.load(folder), DiffusionPipeline)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = quantized(sampling.as_pipeline(tiny.model("unet2d")), method="minmax")
    with pytest.raises(BadInput, match="other files"):
        result.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def calls_that_python_users_get_wrong(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    return {
        "nothing can be kept in .*file": lambda: lowtide.quantize("zoo:digits", folder=file),
        "expected a dtype of torch": lambda: lowtide.load("zoo:digits", dtype="float16"),
        r"give \['tiar'\]": lambda: lowtide.quantize("zoo:digits", method="tfmq", without="tiar"),
        r"pass lowtide.load\('zoo:digits'\)": lambda: lowtide.images(
            "zoo:digits", lowtide.Request()
        ),
        "no bits of weights that fit 5 bytes": lambda: lowtide.plan("zoo:digits", fit=5),
        "expected a list, each a whole number": lambda: lowtide.Request(seeds="0-3"),
    }


def test_a_wrong_call_is_one_sentence(tmp_path):
    for words, call in calls_that_python_users_get_wrong(tmp_path).items():
        with pytest.raises(BadInput, match=words):
            call()


def test_a_request_takes_lists_and_ranges():
    assert lowtide.Request(seeds=range(3), labels=[1, 2]) == lowtide.Request(
        seeds=(0, 1, 2), labels=(1, 2)
    )
