"""The device that a user names: in Python, on the command line, for models named and made."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pretend_device
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

import lowtide
from lowtide import cli, sampling
from lowtide.errors import BadInput
from lowtide.evaluation.metrics import Extractor, Origin, measure
from lowtide.machine import bf16
from lowtide.nn.request_cache import request_caches
from lowtide.sampling.pipelines import ClassConditionalPipeline
from lowtide.stages.reconstruct import Reconstruct

SMALL = {
    "block_out_channels": (16,),
    "down_block_types": ("AttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}
OPTIONS = {"method": "minmax", "steps": 2, "images": 2}


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with pretend_device.present() as found:
        yield found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command; its exit code, stdout and stderr."""

    def ended(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["lowtide", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capfd.readouterr())

    return ended


def pipeline() -> DDIMPipeline:
    torch.manual_seed(0)
    return DDIMPipeline(tiny.unet2d(**SMALL).eval(), DDIMScheduler())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model."""
    place = tmp_path_factory.mktemp("models") / "float"
    pipeline().save_pretrained(place)
    return place


def place_of(pipe: object) -> torch.device:
    return next(sampling.denoiser(pipe).parameters()).device


def test_a_named_model_goes_where_it_is_told(folder: Path, device) -> None:
    assert place_of(lowtide.load(folder)) == device
    assert place_of(lowtide.load(folder, device="cpu")).type == "cpu"
    assert place_of(lowtide.load(folder, device="pretend:1")) == torch.device("pretend:1")
    quantized = lowtide.quantize(folder, **OPTIONS, device="pretend:1")
    assert place_of(quantized.pipe) == torch.device("pretend:1")
    assert quantized.report["device"] == "pretend:1"


def test_what_its_owner_moved_stays_there(device) -> None:
    for owned in (torch.device("cpu"), torch.device("pretend:1")):
        assert place_of(lowtide.quantize(pipeline().to(owned), **OPTIONS).pipe) == owned
        assert place_of(lowtide.quantize(tiny.unet2d(**SMALL).to(owned), **OPTIONS).pipe) == owned


def test_a_pipeline_on_another_device_than_named_is_refused() -> None:
    with pytest.raises(BadInput, match="found device 'pretend:0' with a DDIMPipeline on cpu"):
        lowtide.quantize(pipeline(), **OPTIONS, device="pretend")
    lowtide.quantize(pipeline(), **OPTIONS, device="cpu")


def test_an_engine_of_the_cpu_runs_there_alone(folder: Path) -> None:
    assert place_of(lowtide.load(folder, engine="plain")).type == "cpu"
    with pytest.raises(BadInput, match="found engine 'native' with device 'pretend'"):
        lowtide.load(folder, engine="native", device="pretend")


def test_the_programs_of_the_cpu_step_aside_without_a_word(folder: Path, recwarn) -> None:
    pipe = lowtide.quantize(folder, **OPTIONS).pipe
    request = sampling.Request(steps=2, seeds=(1,))
    recwarn.clear()
    images = sampling.images(pipe, request)
    with lowtide.unfused(pipe):
        assert np.array_equal(sampling.images(pipe, request), images)
    assert not [each for each in recwarn if "layer by layer" in str(each.message)]


def test_a_run_that_was_interrupted_goes_on_there(tmp_path: Path, monkeypatch) -> None:
    """The first unit's codes come from its record, which a file holds and no device."""
    monkeypatch.setattr(bf16, "time_in_bf16", lambda kind: float("inf"))
    options = OPTIONS | {"method": "tfmq", "iters": 1, "calibration_steps": 1, "batch": 2}
    whole = lowtide.quantize(pipeline().to("pretend"), **options, folder=tmp_path)
    records = sorted(tmp_path.glob("*/units/Reconstruct-*.safetensors"))
    assert len(records) > 2
    records[-1].unlink()
    learnt = []
    search = Reconstruct.run
    monkeypatch.setattr(Reconstruct, "run", lambda self, job: learnt.append(search(self, job)))
    again = lowtide.quantize(pipeline().to("pretend"), **options, folder=tmp_path)
    assert len(learnt) == 1
    state = again.model.state_dict()
    differing = [
        name
        for name, value in whole.model.state_dict().items()
        if value.device != state[name].device or not torch.equal(value, state[name])
    ]
    assert differing == []


def test_a_request_cache_answers_there(tmp_path: Path, device) -> None:
    conditions = tiny_pipelines.request_fields("dit")
    images = []
    for place in (torch.device("cpu"), device):
        pipe = tiny_pipelines.dit(tmp_path)
        pipe.to(place)
        options = {"steps": 2, "images": 2, "calibration_steps": 1, "iters": 1, "batch": 1}
        result = lowtide.quantize(pipe, method="temporal_cache", **options, **conditions)
        assert result.plan.requests
        request = sampling.Request(steps=2, seeds=(5,), **conditions)
        with lowtide.unfused(result):
            images.append(sampling.images(result.pipe, request))
    assert np.array_equal(*images)


def test_a_timestep_on_the_cpu_is_answered_there(device) -> None:
    """diffusers' schedulers keep their timesteps on the CPU where nobody tells them otherwise."""
    torch.manual_seed(0)
    pipe = ClassConditionalPipeline(
        tiny.unet2d(num_class_embeds=4, **SMALL).eval(), DDIMScheduler()
    )
    options = {"steps": 2, "images": 2, "calibration_steps": 1, "iters": 1, "batch": 1}
    result = lowtide.quantize(pipe.to(device), method="temporal_cache", labels=(1, 2), **options)
    assert result.plan.requests
    sample = torch.randn(2, 3, 8, 8).to(device)
    timestep = torch.tensor(result.plan.timesteps[0])
    answers = []
    for at in (timestep, timestep.to(device)):
        labels = torch.tensor([1, 2], device=device)
        # Without requests, the features are computed for this call.
        for cache in request_caches(result.model):
            cache.set_plan(result.plan)
        with torch.no_grad():
            answers.append(result.model(sample, at, class_labels=labels).sample.cpu())
    assert torch.equal(*answers)


class Means(nn.Module):
    """An extractor: the mean of each channel, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return images.mean((2, 3)) * self.scale, None, None


def test_metrics_compute_there(device) -> None:
    images = np.random.default_rng(0).random((8, 4, 4, 3), dtype=np.float32)
    found = [
        measure(
            images,
            images[::-1] ** 2,
            ["fd", "kd"],
            seeds=range(8),
            extractor=Extractor("means", Means(), Origin()).on(place),
        )
        for place in (torch.device("cpu"), device)
    ]
    assert found[0] == found[1]
    assert found[0]["fd-means"].value > 0


def test_the_command_line_says_where_it_computes(run, folder: Path, tmp_path: Path) -> None:
    packed = str(tmp_path / "packed")
    options = ["--steps", "2", "--images", "2", "--device", "pretend"]
    code, out, err = run("quantize", str(folder), "--out", packed, "--method", "minmax", *options)
    assert code == 0
    assert err.splitlines()[0] == "device: pretend:0"
    asked = ("evaluate", packed, "--seeds", "0-1", "--metrics", "psnr", "--json")
    shown = []
    for place in ("pretend:1", "cpu"):
        code, out, err = run(*asked, "--device", place, "--reference", str(folder))
        assert (code, err.splitlines()[0]) == (0, f"device: {place}")
        models = json.loads(out)["models"]
        shown.append({name: model["metrics"].get("psnr") for name, model in models.items()})
    ours, theirs = ([each["value"] for each in found.values() if each] for found in shown)
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "--out", "OUT"),
        ("plan",),
        ("sample", "--out", "OUT"),
        ("evaluate",),
        ("compare",),
        ("reschedule", "--out", "OUT", "--steps", "2"),
        ("bench", "quality"),
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(
    run, command, folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(tmp_path / "out") if each == "OUT" else each for each in command]
    names = 2 if command[0] == "bench" else 1
    arguments[names:names] = [str(folder)]
    code, out, err = run(*arguments, "--device", "pretend:7")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: found device 'pretend:7' .*; expected .*; .*\.\n", err)
    assert list(tmp_path.iterdir()) == []
