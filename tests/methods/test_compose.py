"""Stages of all papers in one recipe, in several orders; what cannot be composed is refused."""

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.methods import METHODS, recipe_of
from lowtide.methods.mpq import OMQ, TRD
from lowtide.methods.ptqd import Bias
from lowtide.methods.qdiffusion import Split
from lowtide.methods.tcaq import DAQ, PAR, TCR
from lowtide.methods.temporal_cache import Maintain
from lowtide.models import adapt
from lowtide.nn.precision import Precision
from lowtide.nn.swap import quant_layers, set_precision
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.distill import Distill
from lowtide.stages.fit_ranges import FitRanges, run_call
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.learn_ranges import LearnRanges
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import Reconstruct
from lowtide.stages.tiar import TIAR

OPTIONS = {
    "steps": 3,
    "images": 4,
    "calibration_steps": 2,
    "iters": 4,
    "range_iters": 2,
    "batch": 2,
}
ALL = (
    Collect(),
    Split(),
    Assign(per_step=True),
    TCR(),
    OMQ(),
    FitWeights("mse"),
    TIAR(),
    Maintain(),
    Reconstruct(),
    FitRanges("mse"),
    DAQ(),
    PAR(),
    LearnRanges(),
    TRD(),
    Distill(),
    Bias(),
    Pack(),
)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("ddim", {"weights": 4, "inputs": 4, "only_schedule": True}),
        ("dit", {"weights": 4, "inputs": 4}),
        ("sd", {"weights": 4, "inputs": 4, "only_schedule": True}),
        ("ddim", {"weights": 3, "inputs": 8}),
        ("dit", {"weights": 3, "inputs": 8}),
        pytest.param("sd", {"weights": 3, "inputs": 8}, marks=pytest.mark.slow),
    ],
)
def test_all_papers_at_once(name, more, monkeypatch, tmp_path):
    """It runs, is saved, and draws after loading what it drew before."""
    monkeypatch.setitem(METHODS, "all", lambda settings: ALL)
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    conditions = tiny_pipelines.request_fields(name)
    request = sampling.Request(steps=3, seeds=(5, 6), batch=2, **conditions)
    original = sampling.images(pipe, request)
    result = lowtide.quantize(pipe, method="all", **OPTIONS | conditions | more)
    drawn = sampling.images(pipe, request)
    assert 0 < np.linalg.norm(drawn - original) / np.linalg.norm(original) < 0.7
    again = sampling.images(
        DiffusionPipeline.from_pretrained(result.save(tmp_path / "packed")), request
    )
    assert np.array_equal(again, drawn)


@pytest.mark.parametrize(
    "stages", [(OMQ(), TCR(most=5.0)), (TCR(most=5.0), OMQ())], ids=["OMQ first", "TCR first"]
)
def test_two_stages_that_divide_inputs_divide_them_one_after_the_other(stages):
    """The float answer stays, and the later one works on what the earlier left."""
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    job = Job(
        pipe, pipe.unet, adapt(pipe.unet), Settings(**OPTIONS | {"weights": 4, "inputs": 4}), "test"
    )
    run_recipe((Collect(), Assign(per_step=True)), job)
    before = run_call(job, job.calls[0])[0]
    stages[0].run(job)
    first = {name: layer.divisors.clone() for name, layer in quant_layers(job.model)}
    stages[1].run(job)
    set_precision(job.model, Precision.FLOAT)
    assert ((run_call(job, job.calls[0])[0] - before).norm() / before.norm()).item() < 1e-5
    layers = dict(quant_layers(job.model))
    moved = [name for name, layer in layers.items() if not torch.equal(layer.divisors, first[name])]
    assert len(moved) > 8 and any(
        not torch.equal(first[name], torch.ones_like(first[name])) for name in moved
    )
    assert all(
        job.plan.layers[name].smooth == bool(layer.smooth.numel()) for name, layer in layers.items()
    )


@pytest.mark.parametrize("stages", [(OMQ(), TCR()), (TCR(), OMQ())], ids=["OMQ first", "TCR first"])
def test_what_both_divide_is_loaded_as_it_was_saved(stages, monkeypatch, tmp_path):
    recipe = (Collect(), Assign(per_step=True), *stages, FitWeights(), FitRanges(), Pack())
    monkeypatch.setitem(METHODS, "both", lambda settings: recipe)
    pipe = tiny_pipelines.ddim(tmp_path)
    request = sampling.Request(steps=3, seeds=(5, 6))
    result = lowtide.quantize(pipe, method="both", steps=3, images=4, calibration_steps=2)
    drawn = sampling.images(pipe, request)
    assert np.array_equal(
        sampling.images(lowtide.load(result.save(tmp_path / "packed")), request), drawn
    )


def test_temporal_features_are_rounded_before_they_are_cached(monkeypatch):
    recipe = (
        Collect(),
        Assign(per_step=True),
        FitWeights(),
        Maintain(),
        TIAR(),
        FitRanges(),
        Pack(),
    )
    monkeypatch.setitem(METHODS, "late", lambda settings: recipe)
    with pytest.raises(BadInput, match="maintained already; expected TIAR before"):
        lowtide.quantize(
            sampling.as_pipeline(tiny.model("unet2d")), method="late", steps=3, images=4, iters=4
        )


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_cannot_do_without_stays(method):
    settings = Settings(weights=4, inputs=8)
    names = [type(stage).__name__ for stage in recipe_of(method, settings)]
    needed = [
        name for name in ("Collect", "Assign", "FitWeights", "FitRanges", "Pack") if name in names
    ]
    assert needed[:3] == ["Collect", "Assign", "FitWeights"] and needed[-1] == "Pack"
    for name in needed:
        with pytest.raises(
            BadInput,
            match=f"found --without {name}; expected a stage that the others can do without",
        ):
            recipe_of(method, settings, (name.lower(),))
    for name in set(names) - set(needed):
        assert name not in [type(stage).__name__ for stage in recipe_of(method, settings, (name,))]


def test_what_needs_two_steps_says_so_before_anything_runs():
    with pytest.raises(BadInput, match="found one step"):
        recipe_of("mpq", Settings(steps=1))
    assert recipe_of("mpq", Settings(steps=1), ("trd",)) and recipe_of("mpq", Settings(steps=2))
