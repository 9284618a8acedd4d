"""Held-out images: nothing learns from them, and a block that is worse on them is rolled back."""

import pytest
import tiny
import torch

from lowtide import sampling
from lowtide.models import adapt
from lowtide.models.trace import leaves_of
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.held_out import HeldOut
from lowtide.stages.reconstruct import Learner
from lowtide.stages.stream import Stream

BLOCK = "mid_block.resnets.0"


def started(images: int) -> Job:
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    options = Settings(steps=3, images=images, calibration_steps=2, batch=8, iters=60)
    job = Job(pipe, pipe.unet, adapt(pipe.unet), options, "test")
    run_recipe((Collect(), Assign(), FitWeights("minmax")), job)
    return job


@pytest.fixture(scope="module")
def job():
    return started(18)  # two batches of nine images


def test_the_last_eighth_is_held_out_at_all_steps_and_branches():
    # 16 images in two batches, 3 calls of each, two guidance branches.
    learnt, held = HeldOut(images=16, batch=8, calls=3, rows=16).split()
    shown = [(3 + call) * 16 + row for call in range(3) for row in (6, 7, 14, 15)]
    assert held == shown
    assert sorted(learnt + held) == list(range(6 * 16))
    learnt, held = HeldOut(images=7, batch=7, calls=2, rows=7).split()
    assert learnt == held == list(range(14))


def test_learning_draws_none_of_them_and_judging_nothing_else(job):
    data = next(each for each in Stream(job).walk() if each.unit.name == BLOCK)
    generator = torch.Generator().manual_seed(0)
    learnt: set[int] = set()
    held: set[int] = set()
    for _ in range(40):
        learnt.update(data.choose_learnt(generator))
        held.update(data.choose_held_out(generator))
    # Images 16 and 17 are the last two rows of the second batch's two calls.
    assert held == {25, 26, 34, 35}
    assert learnt == set(range(36)) - held


def test_a_block_that_is_worse_on_held_out_images_is_rolled_back(job):
    """Their targets are what rounding to nearest gives, so that nothing can be better."""
    data = next(each for each in Stream(job).walk() if each.unit.name == BLOCK)
    ref = leaves_of(data.node.output)[0]
    targets = data.targets[ref.id]
    held = data.split[1]
    with torch.no_grad():
        nearest = leaves_of(data.answer(held))[0]
    for number, answer in zip(held, nearest, strict=True):
        targets.batches[number // data.batch][number % data.batch] = answer

    def learn(judged) -> tuple[list[float], bool]:
        learner = Learner(job, "test", data.unit, 60, judged=judged)
        before = {name: each.clone() for name, each in learner.codes().items()}
        learner.learn(data.loss)
        after = learner.codes()
        same = all(torch.equal(after[name], before[name]) for name in before)
        learner.take(before)
        return job.report["losses"][f"test {BLOCK}"], same

    (before, after), rolled_back = learn(data.held_out_loss)
    assert before < 1e-6 < after and rolled_back
    (before, after), rolled_back = learn(data.loss)
    assert after < before and not rolled_back


def test_too_few_images_are_said_once(capsys):
    job = started(4)
    Stream(job)
    Stream(job)
    words = "4 calibration images are too few to hold any out (at least 8)"
    assert capsys.readouterr().err.count(words) == 1
