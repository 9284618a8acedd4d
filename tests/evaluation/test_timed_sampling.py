"""Turns: the same seeds give the same images in batches of another size, and the path is the one the denoiser is asked along."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from packed_pair import pair

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.evaluation import compared_models, timed_sampling

SEEDS = (3, 5, 6)


def untracked(things, total, title):
    return iter(things)


def drawn(batch, folder, *sources, steps=3):
    both = compared_models.distinct([compared_models.load(source) for source in sources])
    return timed_sampling.draw_in_turns(
        both, sampling.Request(steps=steps, seeds=SEEDS, batch=batch), folder, untracked
    )


def relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


# A sum in another order moves a value by 1e-7; where that tips a rounding, a packed model's image moves by one code's worth.
@pytest.mark.parametrize(("place", "bound"), [(0, 1e-5), (1, 2e-2)])
def test_another_batch_size_gives_the_same_images(place, bound, tmp_path):
    (whole,), (single,) = (
        drawn(batch, tmp_path / str(batch), pair()[place]).values() for batch in (3, 1)
    )
    assert relative(np.concatenate(single.images), np.concatenate(whole.images)) < bound


def test_the_path_is_what_the_denoiser_is_asked_next(tmp_path):
    pipe, request = sampling.load_pipeline(pair()[0]), sampling.Request(steps=3, seeds=SEEDS)
    turn = timed_sampling.take(pipe, request)
    heard = list(sampling.trajectory(pipe, request))
    assert turn.timesteps == [int(moment.t[0]) for moment in heard]
    for x, moment in zip(turn.path[:-1], heard[1:], strict=True):
        assert torch.equal(x, moment.arguments["sample"])
    last = (turn.path[-1] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(last, turn.images)
    assert len(turn.seconds) == 3 and min(turn.seconds) > 0


def test_trajectory_error_over_all_batches_is_that_of_one(tmp_path):
    whole, single = (
        drawn(batch, tmp_path / str(batch), *pair())["minmax-w4a8"].trajectory() for batch in (3, 1)
    )
    paths = [
        timed_sampling.take(
            sampling.load_pipeline(each), sampling.Request(steps=3, seeds=SEEDS)
        ).path
        for each in pair()
    ]
    by_hand = [
        float((ours - theirs).norm() / theirs.norm()) for theirs, ours in zip(*paths, strict=True)
    ]
    assert whole["error"] == pytest.approx(by_hand, rel=1e-5)
    assert single["error"] == pytest.approx(by_hand, rel=0.05)
    assert 0 < by_hand[0] < by_hand[1] < 1


def test_a_guided_batch_counts_once(tmp_path):
    pipe = tiny_pipelines.dit(tmp_path)
    turn = timed_sampling.take(
        pipe, sampling.Request(steps=2, seeds=(0, 1), labels=(1,), guidance=3.0)
    )
    assert [len(x) for x in turn.path] == [2, 2]
    image = pipe.vae.decode(turn.path[-1] / pipe.vae.config.scaling_factor).sample
    assert (
        relative((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy(), turn.images)
        < 1e-6
    )


def test_seconds_of_a_step_are_the_median_call_times_its_calls():
    x = torch.ones(1)
    turn = timed_sampling.Turn(
        np.zeros((1, 8, 8, 3), np.float32), [x, x], [500, 0], [9.0, 1.0, 2.0, 3.0]
    )
    drawing = timed_sampling.Drawing()
    drawing.add(turn, turn)
    assert drawing.seconds_per_step == 2.5 * 2


def test_nothing_is_left_behind(tmp_path):
    pipe = sampling.load_pipeline(pair()[0])
    timed_sampling.take(pipe, sampling.Request(steps=2, seeds=(0,)))
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def test_other_schedules_and_sizes_are_refused(tmp_path):
    images, path = np.zeros((1, 8, 8, 3), np.float32), [torch.ones(1)]
    turn = timed_sampling.Turn(images, path, [0], [1.0])
    with pytest.raises(BadInput, match="16 x 16 and of 8 x 8"):
        timed_sampling.check_same(
            timed_sampling.Turn(np.zeros((1, 16, 16, 3), np.float32), path, [0], [1.0]), turn
        )
    with pytest.raises(BadInput, match="timesteps 5 to 5 and 0 to 0"):
        timed_sampling.check_same(timed_sampling.Turn(images, path, [5], [1.0]), turn)
