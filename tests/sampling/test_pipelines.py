"""ClassConditionalPipeline: guidance, saved weights, labels, and a user's own bare model."""

import pytest
import tiny
import torch
from diffusers import DDIMScheduler

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.sampling.pipelines import ClassConditionalPipeline

LABELS = [0, 1, 2]


def pipeline(null: int | None = 3) -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline(tiny.model("unet-class"), DDIMScheduler(), null_label=null)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: ClassConditionalPipeline, **options) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    options |= {"generator": generators, "num_inference_steps": 4, "output_type": "np"}
    return torch.from_numpy(pipe(LABELS, **options).images)


@torch.no_grad()
def by_hand(pipe: ClassConditionalPipeline, scale: float) -> torch.Tensor:
    """The same sampler, with one call for the label and one for the null label."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    x = torch.cat([torch.randn(1, 3, 8, 8, generator=each) for each in generators])
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        with_label = pipe.unet(x, t, class_labels=torch.tensor(LABELS)).sample
        without_label = pipe.unet(x, t, class_labels=torch.tensor([3, 3, 3])).sample
        guided = without_label + scale * (with_label - without_label)
        x = scheduler.step(with_label if scale == 1 else guided, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_guidance_one_is_the_conditional_model():
    pipe = pipeline()
    assert torch.equal(draw(pipe, guidance_scale=1.0), by_hand(pipe, 1.0))


def test_guidance_moves_away_from_the_unlabelled_answer():
    pipe = pipeline()
    assert error(draw(pipe, guidance_scale=3.0), by_hand(pipe, 3.0)) < 1e-4
    assert error(draw(pipe, guidance_scale=3.0), draw(pipe, guidance_scale=1.0)) > 1e-2


def test_guidance_is_two_by_default():
    assert torch.equal(draw(pipeline()), draw(pipeline(), guidance_scale=2.0))
    assert torch.equal(draw(pipeline(null=None)), draw(pipeline(null=None), guidance_scale=1.0))


def test_guidance_without_a_label_for_none_is_refused():
    with pytest.raises(BadInput, match="found guidance 3 and a model without a label for none"):
        draw(pipeline(null=None), guidance_scale=3.0)


def test_a_saved_pipeline_draws_the_same(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    again = sampling.load_pipeline(tmp_path)
    assert type(again) is ClassConditionalPipeline and again.config.null_label == 3
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), draw(pipe))


def test_each_image_gets_its_own_label_in_any_batch():
    pipe = pipeline()
    options = {"steps": 4, "seeds": (0, 1, 2, 3), "labels": (0, 1), "guidance": 2.0}
    request = sampling.Request(**options)
    whole = torch.from_numpy(sampling.images(pipe, request))
    pairs = torch.from_numpy(sampling.images(pipe, sampling.Request(**options, batch=2)))
    assert error(pairs, whole) < 1e-4
    moment = next(sampling.trajectory(pipe, request))
    assert moment.arguments["class_labels"].tolist() == [0, 1, 0, 1, 3, 3, 3, 3]


def test_a_bare_class_conditional_model_gets_labels(tmp_path):
    tiny.model("unet-class").save_pretrained(tmp_path)
    pipe = sampling.load_pipeline(tmp_path)
    assert type(pipe) is ClassConditionalPipeline and pipe.config.null_label is None
    assert sampling.images(pipe, sampling.Request(steps=2, labels=(2,))).shape == (1, 8, 8, 3)
    with pytest.raises(BadInput, match="found label 4; expected 0 to 3"):
        sampling.images(pipe, sampling.Request(steps=2, labels=(4,)))
    with pytest.raises(BadInput, match="no labels"):
        sampling.images(pipe, sampling.Request(steps=2))
