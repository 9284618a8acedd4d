"""The ranges that methods fit themselves: of a temporal block's inputs, and of a softmax."""

import pytest
import tiny
import torch
from tcaq_jobs import started

from lowtide import sampling
from lowtide.formats import Affine
from lowtide.methods import tcaq
from lowtide.methods.tcaq import DAQ
from lowtide.models import adapt
from lowtide.nn.swap import find_clock
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.temporal_features import JobFeatures, input_ranges


@pytest.mark.parametrize("per_step", [True, False])
def test_inputs_of_the_temporal_block_span_a_step_or_all_steps(per_step):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    settings = Settings(steps=4, images=1, inputs=5)
    job = Job(pipe, pipe.unet, adapt(pipe.unet), settings, "test")
    run_recipe((Collect(), Assign(per_step=per_step), FitWeights("minmax")), job)
    (unit,) = job.adapter.temporal()
    features = JobFeatures(job, unit)
    features.floating()
    input_ranges(job, unit, features)
    seen: dict[str, torch.Tensor] = {}
    for name in unit.layers:
        job.model.get_submodule(name).input.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
    with torch.no_grad():
        features()
    clock = find_clock(job.model)
    assert seen.keys() == set(unit.layers)
    for name, x in seen.items():
        rows = x.flatten(1) if per_step else x.reshape(1, -1)
        grid = Affine(5).params(rows.amin(1), rows.amax(1))
        row = job.model.get_submodule(name).input.row
        steps = 4 if per_step else 1
        assert torch.allclose(clock.scale[row][:steps], grid.scale, rtol=1e-5)
        assert torch.equal(clock.zero[row][:steps].float(), grid.zero)


@pytest.mark.parametrize("by", ["law", "error"])
def test_a_uniform_softmax_ends_at_its_peak_by_law_and_where_it_errs_least_by_error(
    by, monkeypatch
):
    monkeypatch.setattr(tcaq, "power_law_wins", lambda *_: -1.0)
    monkeypatch.setattr(
        tcaq, "_by_error", lambda job, grids: dict.fromkeys(grids, torch.zeros(4).bool())
    )
    job = started(tiny.model("unet2d"), inputs=4)
    run_recipe((FitWeights("minmax"), FitRanges()), job)
    name = next(iter(job.plan.attentions))
    quantizer = job.model.get_submodule(f"{name}.processor.softmax")
    to_the_peak = quantizer.clock.scale[quantizer.row].clone()
    DAQ(by=by).run(job)
    scale = quantizer.clock.scale[quantizer.row]
    assert quantizer.format == Affine(4) and len(scale) == 4
    if by == "law":
        assert torch.allclose(scale, to_the_peak, rtol=1e-5)
    else:
        assert (scale < 0.95 * to_the_peak).all()
