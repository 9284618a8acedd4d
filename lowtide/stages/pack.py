"""Pack: replace simulated layers by layers that hold their codes at the true number of bits."""

from dataclasses import dataclass
from typing import ClassVar

from lowtide.costs import Cost, Workload
from lowtide.costs.workload import ROUND
from lowtide.nn.extension import accept_new_timesteps
from lowtide.nn.feature_cache import Cached, ZeroFeatures
from lowtide.nn.request_cache import add_request_cache
from lowtide.nn.swap import drop_unused_rows, pack_modules, replace_module
from lowtide.stages.base import Job, Stage
from lowtide.stages.model_edits import forget


@dataclass(frozen=True)
class Pack(Stage):
    """Replace every quantized layer by its packed twin; outputs stay equal bit for bit."""

    essential: ClassVar[bool] = True

    def run(self, job: Job) -> None:
        _drop_unused_layers(job)
        pack_modules(job.model)
        # Of a module without a configuration, the adapter cannot be made again.
        is_bare = not callable(getattr(type(job.model), "from_config", None))
        adapter = job.adapter if is_bare else None
        if job.plan.requests:
            add_request_cache(job.model, job.plan, adapter)
        accept_new_timesteps(job.model, job.plan, adapter)
        job.calls = []

    def cost(self, load: Workload) -> Cost:
        """Each code is packed bit by bit."""
        bits = min(load.settings.weights, 8)
        whole = load.network.whole
        return Cost(ROUND * bits * whole.weights * load.speed.value, (bits + 2) * whole.largest)

    def predict_plan(self, job: Job) -> None:
        """Layers that a cache replaces leave the plan."""
        _drop_unused_layers(job)

    def summary(self, job: Job) -> str:
        return f"codes of {len(job.plan.layers)} layers packed"


def _drop_unused_layers(job: Job) -> None:
    """Remove temporal layers whose answers all come from a cache, and their input ranges."""
    for name, cache in job.plan.cached.items():
        if not cache.computed and not cache.kept:
            cached = job.model.get_submodule(name)
            assert isinstance(cached, Cached)
            cached.layer = None
            forget(job, name)
    for name, width in job.plan.blank.items():
        replace_module(job.model, name, ZeroFeatures(width))
        forget(job, name)
    drop_unused_rows(job.model)
