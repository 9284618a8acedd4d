"""A blueprint: its calls are those of the real pipeline, and it reads configurations alone."""

from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler

from lowtide import sampling
from lowtide.costs import Network, Speed
from lowtide.estimate import blueprint, prediction
from lowtide.models.named_inputs import flat_inputs
from lowtide.settings import Settings

UNBATCHED = ("img_ids", "txt_ids", "timestep")


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_calls_are_those_of_the_real_trajectory(
    name: str, tmp_path: Path, quiet_speed: Speed
) -> None:
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    pipe.save_pretrained(tmp_path / "float")
    settings = Settings(steps=4, images=3, **tiny_pipelines.request_fields(name))
    shapes_only = blueprint.read(str(tmp_path / "float"))
    request = sampling.Request(
        4, (1, 2, 3), settings.prompts, settings.labels, batch=3, size=settings.size
    )
    moments = list(sampling.trajectory(pipe, request))
    network = Network(shapes_only.adapter(settings))
    load = prediction.workload(shapes_only, network, settings, quiet_speed)
    assert load.calls == len(moments)
    assert load.batch == len(moments[0].t)
    ours = sample_shapes(shapes_only.example(settings))
    theirs = sample_shapes(moments[0].arguments)
    assert ours == {name: shape for name, shape in theirs.items() if name in ours}


def sample_shapes(arguments: dict) -> dict[str, torch.Size]:
    """Shapes of one sample of each input by dotted name, without inputs that have no batch axis."""
    inputs = flat_inputs(arguments).items()
    return {name: value.shape[1:] for name, value in inputs if name not in UNBATCHED}


@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler]
)
def test_solvers_that_call_more_often(scheduler: type, tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "float")
    shapes_only = blueprint.read(str(tmp_path / "float"))
    real = sampling.timesteps(pipe, sampling.Request(4, (1,), ("a",), size=16))
    assert shapes_only.timesteps(Settings(steps=4)) == pytest.approx(real, abs=1e-3)


@pytest.mark.parametrize(("guidance", "branches"), [(None, 2), (1.0, 1), (3.0, 2)])
def test_guidance_doubles_the_calls(guidance: float | None, branches: int, tmp_path: Path) -> None:
    tiny_pipelines.stable_diffusion(tmp_path).save_pretrained(tmp_path / "float")
    assert blueprint.read(str(tmp_path / "float")).branches(Settings(guidance=guidance)) == branches


def test_a_hub_id_fetches_configurations_only(sdxl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = {}
    monkeypatch.setattr(
        blueprint,
        "snapshot_download",
        lambda source, **options: request.update(options, source=source) or sdxl,
    )
    assert blueprint.read("stabilityai/sdxl").pipeline == "StableDiffusionXLPipeline"
    assert request["source"] == "stabilityai/sdxl"
    assert all(pattern.endswith(".json") for pattern in request["allow_patterns"])
