"""Distill: it improves, resumes to the same bits, mixes timesteps, and leaves integers only."""

from dataclasses import replace

import pytest
import tiny
import tiny_pipelines
import torch

import lowtide
from lowtide import sampling
from lowtide.models import adapt
from lowtide.nn.precision import Precision
from lowtide.nn.swap import find_clock, quant_layers, set_precision
from lowtide.settings import Settings
from lowtide.stages import distill
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Term, run_recipe
from lowtide.stages.batches import CalibrationBatches, last_features
from lowtide.stages.collect import Collect
from lowtide.stages.distill import Distill, DistillLoop, Student, answer_of
from lowtide.stages.fit_ranges import FitRanges, run_call
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.pack import Pack

OPTIONS = {
    "weights": 3,
    "inputs": 6,
    "steps": 4,
    "images": 8,
    "calibration_steps": 2,
    "iters": 40,
    "batch": 8,
}


def prepared(folder=None, **settings) -> Job:
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    pipe.unet.requires_grad_(False)
    job = Job(pipe, pipe.unet, adapt(pipe.unet), Settings(**OPTIONS | settings), "test", folder)
    run_recipe((Collect(), Assign(per_step=True), FitWeights("mse"), FitRanges("mse")), job)
    return job


def state(job: Job) -> dict[str, torch.Tensor]:
    run_recipe((Distill(), Pack()), job)
    return job.model.state_dict()


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_it_comes_nearer_on_held_out_images():
    job = prepared(iters=150)
    Distill().run(job)
    before, after = job.report["losses"]["Distill network"]
    assert after < 0.75 * before


def test_worse_than_the_start_is_thrown_away():
    job = prepared(iters=3)
    student = Student(job, Distill())
    start = student.state()
    Distill(weight_rate=1e3, range_rate=1.0).run(job)
    before, after = job.report["losses"]["Distill network"]
    assert not after < before
    assert same(student.state(), start)


def test_input_scales_learn_for_their_own_steps():
    job = prepared(iters=10)
    before = find_clock(job.model).scale.clone()
    Distill(weight_rate=0, scale_rate=0).run(job)
    moved = (find_clock(job.model).scale / before - 1).abs()
    assert (moved.amax(0) > 1e-3).all()
    assert (moved.std(1) > 1e-4).float().mean() > 0.5  # not all steps of an input alike
    job = prepared(iters=10)
    Distill(ranges=False).run(job)
    assert (find_clock(job.model).scale / before - 1).abs().max() < 1e-5


def test_equal_seeds_give_equal_bits_whatever_ran_before():
    first = state(prepared(iters=4))
    torch.manual_seed(7)
    torch.rand(3)
    assert same(first, state(prepared(iters=4)))
    assert not same(first, state(prepared(iters=4, seed=1)))


def test_an_interrupted_run_resumes_from_its_last_record_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "RECORD_EVERY", 3)
    whole = state(prepared(iters=8))
    loss = DistillLoop.loss
    count = []

    def dying(self, generator):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        return loss(self, generator)

    monkeypatch.setattr(DistillLoop, "loss", dying)
    with pytest.raises(KeyboardInterrupt):
        state(prepared(tmp_path, iters=8))
    assert same(state(prepared(tmp_path, iters=8)), whole)
    assert len(count) == 6 + 5  # three of the eight were recorded
    assert same(state(prepared(tmp_path, iters=8)), whole)
    assert len(count) == 11  # all recorded


def test_nothing_but_integers_and_tables_remains_and_packed_equals_simulated():
    job = prepared(iters=4)
    Distill().run(job)
    call = job.calls[1]
    simulated = run_call(job, call)[0]
    assert all(layer.rounding is None for _, layer in quant_layers(job.model))
    Pack().run(job)
    assert torch.equal(job.model(**call.arguments)[0], simulated)
    dtypes = {name: tensor.dtype for name, tensor in job.model.state_dict().items()}
    for part in ("down.", "rounding", "log_scale", "learnt"):
        assert not any(part in name for name in dtypes), part
    assert all(dtypes[f"{name}.weight"] == torch.uint8 for name in job.plan.layers)


def test_nothing_quantized_is_left_alone():
    job = prepared(weights=32, inputs=32, iters=2)
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    Distill().run(job)
    assert same(job.model.state_dict(), before)
    assert "losses" not in job.report


@pytest.mark.parametrize("name", ["ddim", "sdxl", "dit", "pixart", "flux"])
def test_a_batch_of_mixed_timesteps_answers_as_its_calls_did(name, tmp_path):
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    settings = Settings(
        **{"steps": 3, "images": 4, "calibration_steps": 1, "batch": 6}
        | tiny_pipelines.request_fields(name)
    )
    model = sampling.denoiser(pipe)
    job = Job(pipe, model, adapt(model), settings, "test")
    run_recipe((Collect(), Assign(per_step=True), FitWeights(), FitRanges()), job)
    batches = CalibrationBatches(job)
    assert {batches.image(place) for place in batches.held_out} == {3}
    assert {batches.image(place) for place in batches.training} == {0, 1, 2}
    set_precision(job.model, Precision.FLOAT)
    chosen = batches.draw(batches.training, torch.Generator().manual_seed(0))
    assert len({call for call, _ in chosen}) > 1
    ours = answer_of(job.model(**batches.arguments(chosen)))
    theirs = batches.targets(chosen)
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4


def test_pairs_are_the_same_images_one_step_later():
    batches = CalibrationBatches(prepared(steps=3))
    batch = batches.windows(torch.Generator().manual_seed(0))
    first = batch[: len(batch) // 2]
    second = batch[len(batch) // 2 :]
    assert len(first) == len(second) == 4
    for now, later in zip(first, second, strict=True):
        assert batches.image(now) == batches.image(later)
        assert batches.calls[now[0]].timestep > batches.calls[later[0]].timestep
    with pytest.raises(lowtide.errors.BadInput, match="found one step"):
        CalibrationBatches(prepared(steps=1)).windows(torch.Generator())


def test_guidance_branches_are_held_out_together():
    job = prepared(steps=2)
    doubled = {
        "sample": torch.cat([job.calls[0].arguments["sample"]] * 2),
        "timestep": torch.zeros(16),
    }
    job.calls = [replace(call, arguments=job.calls[0].arguments | doubled) for call in job.calls]
    batches = CalibrationBatches(job)
    assert {row for _, row in batches.held_out} == {7, 15}


@pytest.mark.parametrize(
    ("iters", "options", "rates"),
    [
        (16_000, {}, (1 / 2500, 1e-3, 1e-4)),
        (1_000, {}, (8 / 2500, 8e-3, 8e-4)),
        (32_000, {"ranges": False}, (1 / 2500, 0.0, 1e-4)),
        (1_000, {"scale_rate": 0.01, "range_rate": 0.01}, (8 / 2500, 0.02, 0.02)),
    ],
)
def test_rates_are_the_papers_at_its_iterations_and_larger_with_fewer(iters, options, rates):
    """Eight is 16 to the power of 3/4; a scale changes by 2 % of itself at most."""
    job = prepared(iters=iters, steps=1, images=2)
    student = Student(job, Distill(rank=3, **options))
    steps = [layer.grid.scale.mean().item() for layer in student.layers.values()]
    *factors, ranges, scales = student.start()
    weight_rate, range_rate, scale_rate = rates
    ours = [group["lr"] for group in factors]
    assert ours == pytest.approx([weight_rate * step for step in steps])
    assert ranges["lr"] == pytest.approx(range_rate) and scales["lr"] == pytest.approx(scale_rate)
    assert len(ranges["params"]) == len(student.inputs)
    assert len(scales["params"]) == len(student.layers) == len(factors)
    for group, layer in zip(factors, student.layers.values(), strict=True):
        rows, columns = layer.weight.flatten(1).shape
        assert {tuple(each.shape) for each in group["params"]} == {(rows, 3), (3, columns)}
    student.finish()


def test_the_rate_falls_to_zero_in_a_line(monkeypatch):
    rates: list[list[float]] = []
    step = torch.optim.Adam.step

    def stepped(self):
        rates.append([round(group["lr"] / group["first"], 9) for group in self.param_groups])
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", stepped)
    Distill().run(prepared(iters=4, steps=1, images=2))
    assert [set(each) for each in rates] == [{1.0}, {0.75}, {0.5}, {0.25}]


def test_a_judgement_is_the_mean_loss_of_four_batches(monkeypatch):
    job = prepared(images=16, steps=1)
    loop = DistillLoop(job, Student(job, Distill()))
    held_out: list[list] = []
    losses = iter([1.0, 2.0, 3.0, 6.0] * 2)

    def task_loss(self, batch):
        held_out.append(batch)
        return torch.tensor(next(losses))

    monkeypatch.setattr(DistillLoop, "task_loss", task_loss)
    assert loop.judge() == loop.judge() == 3.0
    assert held_out[:4] == held_out[4:]
    assert len({tuple(batch) for batch in held_out}) > 1
    assert {loop.batches.image(place) for batch in held_out for place in batch} == {14, 15}


def test_the_loss_is_summed_over_a_sample_and_terms_are_added():
    job = prepared(steps=2, images=4)
    loop = DistillLoop(job, Student(job, Distill()))
    batch = [(0, 1), (0, 2), (1, 1), (1, 2)]
    set_precision(job.model, Precision.FULL)
    with torch.no_grad():
        ours = run_answers(job, batch)
        plain = loop.task_loss(batch).item()
        expected = (ours - loop.batches.targets(batch)).square().sum((1, 2, 3)).mean().item()
        assert plain == pytest.approx(expected, rel=1e-4)
        seen: list[tuple] = []
        job.terms = [Term(lambda *sides: (seen.append(sides), torch.tensor(0.5))[1])] * 2
        assert loop.paired_loss(batch).item() == pytest.approx(plain + 1.0, rel=1e-4)
    student, teacher = seen[0]
    assert student.shape == teacher.shape == (2, 2, 16, 64)
    set_precision(job.model, Precision.FLOAT)
    with last_features(job) as features, torch.no_grad():
        loop.answer(batch)
    assert torch.equal(teacher, features[0].reshape(2, 2, 16, 64))
    assert not torch.equal(student, teacher)


def run_answers(job: Job, batch: list[tuple[int, int]]) -> torch.Tensor:
    """The model's answers to these samples, from whole calls."""
    whole = [run_call(job, call)[0] for call in job.calls]
    return torch.stack([whole[call][row] for call, row in batch])
