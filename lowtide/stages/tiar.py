"""TIAR: rounding the temporal information block for its own features; shared by TFMQ-DM and its extension."""

from dataclasses import dataclass

import torch

from lowtide.errors import BadInput
from lowtide.models import Unit
from lowtide.stages.base import Job
from lowtide.stages.reconstruct import Learner
from lowtide.stages.temporal_features import JobFeatures
from lowtide.validation import Count


@dataclass(frozen=True)
class TIAR:
    """Temporal information aware reconstruction: round the temporal block so that its features stay put.

    minimise over the rounding of h and all g_i:   sum_i || g_i(h(t)) - g^_i(h^(t)) ||^2,   t in {1..T}

    A pass over all t costs next to nothing, so it gets `times` as many iterations as a block.
    """

    times: Count = 5

    def run(self, job: Job) -> None:
        if job.maintained:
            raise BadInput(
                "found temporal features that are maintained already",
                "TIAR before what caches them",
                "put it first",
            )
        for unit in job.track(job.adapter.temporal(), "temporal block"):
            self.round_unit(job, unit)
        job.maintained = True

    def round_unit(self, job: Job, unit: Unit) -> None:
        features = JobFeatures(job, unit)
        target = features.floating()

        def loss(generator: torch.Generator) -> torch.Tensor:
            return sum(
                (ours - theirs).square().sum(1).mean()
                for ours, theirs in zip(features(), target, strict=True)
            )

        Learner(job, "TIAR", unit, self.times * job.settings.iters).learn(loss)
