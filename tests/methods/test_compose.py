"""Stages of every paper in one recipe: the four and their baselines, each after the other."""

import numpy as np
import pytest
import tiny_pipelines
from diffusers import DiffusionPipeline

import lowtide
from lowtide import sample
from lowtide.methods import METHODS
from lowtide.methods.mpq import OMQ, TRD
from lowtide.methods.ptqd import Bias
from lowtide.methods.qdiffusion import Split
from lowtide.methods.tcaq import DAQ, PAR, TCR
from lowtide.methods.temporal_cache import Maintain
from lowtide.stages.assign import Assign
from lowtide.stages.collect import Collect
from lowtide.stages.distill import Distill
from lowtide.stages.pack import Pack
from lowtide.stages.ranges import FitRanges
from lowtide.stages.reconstruct import LearnRanges, Reconstruct
from lowtide.stages.temporal import TIAR
from lowtide.stages.weights import FitWeights

OPTIONS = {"steps": 3, "images": 4, "kept": 2, "iters": 4, "range_iters": 2, "batch": 2}
ALL = (
    *(Collect(), Split(), Assign(per_step=True), TCR(), OMQ(), FitWeights("mse"), TIAR(), Maintain(), Reconstruct()),
    *(FitRanges("mse"), DAQ(), PAR(), LearnRanges(), TRD(), Distill(), Bias(), Pack()),
)


@pytest.mark.parametrize("name", ["ddim", "dit", "sd"])
@pytest.mark.parametrize("more", [{"weights": 4, "inputs": 4}, {"weights": 3, "inputs": 8, "keep_temporal": True}])
def test_all_papers_at_once(name, more, monkeypatch, tmp_path):
    """It runs, is saved, and draws after loading what it drew before."""
    monkeypatch.setitem(METHODS, "all", lambda settings: ALL)
    pipe, asked = tiny_pipelines.PIPELINES[name](tmp_path), tiny_pipelines.asked(name)
    request = sample.Request(steps=3, seeds=(5, 6), batch=2, **asked)
    original = sample.images(pipe, request)
    result = lowtide.quantize(pipe, method="all", **OPTIONS | asked | more)
    drawn = sample.images(pipe, request)
    assert 0 < np.linalg.norm(drawn - original) / np.linalg.norm(original) < 0.7
    again = sample.images(DiffusionPipeline.from_pretrained(result.save(tmp_path / "packed")), request)
    assert np.array_equal(again, drawn)
