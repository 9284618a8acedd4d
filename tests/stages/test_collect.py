"""Collect: which steps serve reconstruction, what calls share, and which images are drawn."""

from dataclasses import replace

import pytest
import tiny
import tiny_pipelines
import torch

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.models import adapt
from lowtide.sampling import Moment
from lowtide.settings import Settings
from lowtide.stages.base import Job
from lowtide.stages.batches import CalibrationBatches, last_features
from lowtide.stages.collect import Collect, calibration_request, check_answer
from lowtide.stages.fit_ranges import run_call


def collected(pipe=None, **settings) -> Job:
    pipe = pipe or sampling.as_pipeline(tiny.model("unet2d"))
    model = sampling.denoiser(pipe)
    job = Job(pipe, model, adapt(model), Settings(**settings), "test")
    Collect().run(job)
    return job


@pytest.mark.parametrize(
    ("count", "kept"),
    [(1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (4, [0, 2, 3, 5]), (6, range(6))],
)
def test_the_kept_steps_are_spread_from_the_first_to_the_last(count, kept):
    job = collected(steps=6, images=18, calibration_steps=count)
    known = sorted({call.timestep for call in job.calls}, reverse=True)
    assert [call.timestep for call in job.calls] == known * 2  # two batches of nine images
    assert len(known) == job.report["timesteps"] == 6
    for batch in (job.calls[:6], job.calls[6:]):
        assert [step for step, call in enumerate(batch) if call.kept] == list(kept)


def test_arguments_that_stay_the_same_are_the_same_tensors(tmp_path):
    """Prompts are held once for all steps of a batch; samples and timesteps change."""
    job = collected(
        tiny_pipelines.sdxl(tmp_path),
        **{"steps": 2, "images": 1} | tiny_pipelines.request_fields("sdxl"),
    )
    first, second = (call.arguments for call in job.calls)
    assert first["encoder_hidden_states"] is second["encoder_hidden_states"]
    added = "added_cond_kwargs"
    assert first[added]["text_embeds"] is second[added]["text_embeds"]
    assert not torch.equal(first["sample"], second["sample"])
    assert first["timestep"] is not second["timestep"]


def test_the_request_is_the_settings_and_its_seeds_are_nobody_elses():
    settings = Settings(
        steps=7, images=3, prompts=("a", "b"), labels=(1, 2), guidance=2.5, eta=0.5, size=64
    )
    job = replace(collected(steps=1, images=1), settings=settings)
    request = calibration_request(job)
    for name in ("steps", "prompts", "labels", "guidance", "eta", "size"):
        assert getattr(request, name) == getattr(settings, name)
    assert request.batch == settings.calibration_batch
    assert len(set(request.seeds)) == 3 and min(request.seeds) > 1e9
    other = calibration_request(replace(job, settings=replace(settings, seed=1)))
    assert not set(request.seeds) & set(other.seeds)


@pytest.mark.parametrize("last", [False, True])
def test_a_model_that_samples_nan_is_refused(last):
    """Also where the answer of the last step alone is none, which no later input shows."""
    model = tiny.model("unet2d")

    def spoil(module, args, kwargs, result):
        if args and (not last or args[1] == 0):  # a recording on shapes gives no args
            result[0][0, 0, 0, 0] = torch.nan

    model.register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(BadInput, match="found NaN or infinity in the model's answer at timestep"):
        collected(sampling.as_pipeline(model), steps=3, images=1)


def test_an_overflow_of_half_precision_says_what_helps():
    moment = Moment(0, torch.tensor([9]), {}, torch.tensor([[torch.inf]], dtype=torch.float16))
    with pytest.raises(BadInput, match=r"timestep 9; .* use --dtype bfloat16"):
        check_answer(moment)


def test_an_image_is_held_out_at_all_its_steps():
    """Of 18 images in two batches of nine, the last two are the last rows of the second batch."""
    batches = CalibrationBatches(collected(steps=3, images=18, batch=5))
    assert batches.held_out == [(call, row) for call in (3, 4, 5) for row in (7, 8)]
    rest = {(call, row) for call in range(6) for row in range(9)} - set(batches.held_out)
    assert batches.training == sorted(rest)
    assert [batches.image(place) for place in ((0, 4), (2, 4), (3, 4))] == [4, 4, 13]
    generator = torch.Generator().manual_seed(0)
    assert len(batches.draw(batches.training, generator)) == 5
    assert len(batches.draw(batches.held_out[:2], generator)) == 2
    # A pair needs a next step of the same batch.
    calls = set()
    for _ in range(50):
        first, second, *later = batches.windows(generator)
        assert later == [(first[0] + 1, first[1]), (second[0] + 1, second[1])]
        calls |= {first[0], second[0]}
    assert calls == {0, 1, 3, 4}


def test_the_last_layers_inputs_are_recorded_inside_the_context_alone():
    job = collected(steps=1, images=2)
    with last_features(job) as features:
        run_call(job, job.calls[0])
    run_call(job, job.calls[0])
    assert [tuple(each.shape) for each in features] == [(2, 16, 64)]
    norm = job.model.conv_norm_out
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda module, args, answer: seen.append(answer))
    run_call(job, job.calls[0])
    assert torch.equal(features[0], torch.nn.functional.silu(seen[0]).flatten(2))
