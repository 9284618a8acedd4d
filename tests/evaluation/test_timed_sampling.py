"""Timed sampling: images do not depend on the batch size, and samples are the denoiser's inputs."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from packed_pair import pair

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.evaluation import compared_models, sampling_turns, timed_sampling
from lowtide.evaluation.timed_sampling import ModelSamples, SampledBatch, sample_batch

SEEDS = (3, 5, 6)


def sampled(batch, folder, *sources):
    models = compared_models.distinct([compared_models.load(source) for source in sources])
    request = sampling.Request(steps=3, seeds=SEEDS, batch=batch)
    return sampling_turns.sample_in_turns(models, request, folder / str(batch))


def relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


# Another order of sums moves a value by 1e-7. If that changes a rounding, an image of a packed
# model moves by about one code.
@pytest.mark.parametrize(("place", "bound"), [(0, 1e-5), (1, 2e-2)])
def test_another_batch_size_gives_the_same_images(place, bound, tmp_path):
    (whole,) = sampled(3, tmp_path, pair()[place]).values()
    (single,) = sampled(1, tmp_path, pair()[place]).values()
    assert relative(np.concatenate(single.images), np.concatenate(whole.images)) < bound


def test_each_sample_is_the_next_input_of_the_denoiser():
    pipe = sampling.load_pipeline(pair()[0])
    request = sampling.Request(steps=3, seeds=SEEDS)
    batch = sample_batch(pipe, request)
    moments = list(sampling.trajectory(pipe, request))
    assert batch.timesteps == [int(moment.t[0]) for moment in moments]
    for x, moment in zip(batch.samples[:-1], moments[1:], strict=True):
        assert torch.equal(x, moment.arguments["sample"])
    last = (batch.samples[-1] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(last, batch.images)
    assert len(batch.seconds) == 3
    assert min(batch.seconds) > 0


def test_trajectory_error_over_all_batches_is_that_of_one(tmp_path):
    whole = sampled(3, tmp_path, *pair())["minmax-w4a8"].trajectory()
    single = sampled(1, tmp_path, *pair())["minmax-w4a8"].trajectory()
    request = sampling.Request(steps=3, seeds=SEEDS)
    pipes = map(sampling.load_pipeline, pair())
    reference, packed = (sample_batch(pipe, request).samples for pipe in pipes)
    steps = zip(reference, packed, strict=True)
    by_hand = [float((ours - theirs).norm() / theirs.norm()) for theirs, ours in steps]
    assert whole.error == pytest.approx(by_hand, rel=1e-5)
    assert single.error == pytest.approx(by_hand, rel=0.05)
    assert 0 < by_hand[0] < by_hand[1] < 1


def test_a_guided_batch_counts_once(tmp_path):
    pipe = tiny_pipelines.dit(tmp_path)
    request = sampling.Request(steps=2, seeds=(0, 1), labels=(1,), guidance=3.0)
    batch = sample_batch(pipe, request)
    assert [len(x) for x in batch.samples] == [2, 2]
    decoded = pipe.vae.decode(batch.samples[-1] / pipe.vae.config.scaling_factor).sample
    images = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    assert relative(images, batch.images) < 1e-6


def test_seconds_per_step_are_the_median_call_times_the_calls():
    x = torch.ones(1)
    images = np.zeros((1, 8, 8, 3), np.float32)
    batch = SampledBatch(images, [x, x], [500, 0], [9.0, 1.0, 2.0, 3.0])
    samples = ModelSamples()
    samples.add(batch, batch)
    assert samples.seconds_per_step == 2.5 * 2


def test_hooks_are_removed():
    pipe = sampling.load_pipeline(pair()[0])
    sample_batch(pipe, sampling.Request(steps=2, seeds=(0,)))
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


def test_other_schedules_and_sizes_are_refused():
    images = np.zeros((1, 8, 8, 3), np.float32)
    large = np.zeros((1, 16, 16, 3), np.float32)
    samples = [torch.ones(1)]
    batch = SampledBatch(images, samples, [0], [1.0])
    with pytest.raises(BadInput, match="16 x 16 and of 8 x 8"):
        timed_sampling.check_same_sampling(SampledBatch(large, samples, [0], [1.0]), batch)
    with pytest.raises(BadInput, match="timesteps 5 to 5 and 0 to 0"):
        timed_sampling.check_same_sampling(SampledBatch(images, samples, [5], [1.0]), batch)
