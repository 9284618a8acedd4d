"""Temporal features for one request: a block that reads a label or a text as well as t answers once for all steps.

No cache made beforehand could be right for it, but within a request only t changes. At the first call of a request the
block runs on all calibrated timesteps in one batch; later calls look their step up. A call with other conditions starts a
new request, and a timestep that is not exactly one of the calibrated ones is computed: never a stale value. Two requests are
known at a time, for pipelines that call the denoiser once for each branch of guidance.
"""

import inspect
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowtide.nn.clock import CLOCK
from lowtide.nn.plan import Plan
from lowtide.nn.split import split_modules

BRANCHES = 2


class RequestFeatures(NamedTuple):
    """Conditions, and the features of all steps under them."""

    conditions: dict[str, Tensor]
    features: dict[str, Tensor]


class RequestCache:
    """What is known of the running requests, the latest last, and which step is asked for."""

    def __init__(self, root: nn.Module, plan: Plan):
        self.root = root
        self.parameters = list(inspect.signature(root.forward).parameters)
        self.working = False
        self._adapter: Any = None
        self.take(plan)

    def take(self, plan: Plan) -> None:
        """Forget the running request, and work by this plan's timesteps from now on."""
        self.plan, self.steps = plan, {time: step for step, time in enumerate(plan.times)}
        self.requests: list[RequestFeatures] = []
        self.row: int | None = None

    def open(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call comes in: is it the request we know, and which step is it?"""
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        timestep = torch.as_tensor(given["timestep"])
        self.row = self.step_of(timestep.detach().double().flatten().tolist())
        if self.row is None:
            return
        reads = {name for names in self.plan.requests.values() for name in names} - {"timestep"}
        conditions = {name: inner(given, name) for name in sorted(reads)}
        known = next(
            (request for request in self.requests if same(conditions, request.conditions)), None
        )
        others = [request for request in self.requests if request is not known]
        self.requests = [*others[1 - BRANCHES :], known or self.build(conditions, timestep)]

    def step_of(self, values: list[float]) -> int | None:
        """The calibrated step of exactly this timestep, if all samples share it."""
        return self.steps.get(values[0]) if len(set(values)) == 1 else None

    @property
    def adapter(self) -> Any:
        """The architecture, found once, on a model of shapes alone.

        Its module is looked up now: this one is imported while diffusers is, which that one needs whole.
        """
        if self._adapter is None:
            with torch.device("meta"):
                floating = type(self.root).from_config(self.root.config)
                split_modules(floating, self.plan.splits)
            self._adapter = import_module("lowtide.models").adapt(floating.to(self.root.dtype))
        return self._adapter

    @torch.no_grad()
    def build(self, conditions: dict[str, Tensor], timestep: Tensor) -> RequestFeatures:
        """Run the temporal units on every step of this request, as one batch."""
        batch, times = (
            len(next(iter(conditions.values()))),
            torch.tensor(list(self.steps), dtype=torch.float64),
        )
        rows = {
            name: value.repeat(len(times), *[1] * (value.dim() - 1))
            for name, value in conditions.items()
        }
        rows["timestep"] = times.repeat_interleave(batch).to(timestep)
        clock, turned = self.root.get_submodule(CLOCK), self.root.get_submodule(CLOCK).index
        clock.set(rows["timestep"])
        found: dict[str, Tensor] = {}
        self.working = True
        for unit in (
            unit for unit in self.adapter.temporal() if unit.features[0] in self.plan.requests
        ):
            graph = self.adapter.temporal_graph(unit, batch * len(times))
            answers = graph.replay(self.root, {name: rows[name] for name in unit.reads})
            for name, answer in zip(unit.features, answers, strict=True):
                found[name] = answer.unflatten(0, (len(times), batch))
        self.working, clock.index = False, turned
        return RequestFeatures({name: value.clone() for name, value in conditions.items()}, found)

    def answer(self, name: str) -> Tensor | None:
        """The feature at the step that is asked for, if it is known."""
        return (
            None if self.working or self.row is None else self.requests[-1].features[name][self.row]
        )


def inner(given: dict[str, Any], name: str) -> Tensor:
    """The tensor of that dotted name."""
    for part in name.split("."):
        given = given[part]
    return given


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        alike(value, theirs[name]) for name, value in ours.items()
    )


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """On another device is another request: the features would lie on the wrong one, and `torch.equal` would raise."""
    return (ours.device, ours.dtype) == (theirs.device, theirs.dtype) and torch.equal(ours, theirs)


class PerRequest(nn.Module):
    """Takes a temporal layer's place: answers from the desk, or asks the layer."""

    def __init__(self, name: str, layer: nn.Module, desk: RequestCache):
        super().__init__()
        self.name, self.layer = name, layer
        # The desk knows the whole model; a plain attribute keeps it out of this module's own state.
        object.__setattr__(self, "desk", desk)

    def forward(self, x: Tensor) -> Tensor:
        found = self.desk.answer(self.name)
        return self.layer(x) if found is None else found.to(x.dtype)


def answer_by_request(root: nn.Module, plan: Plan) -> None:
    """Wrap the layers that the plan names, and listen at the denoiser's door (after its clock)."""
    desk = RequestCache(root, plan)
    for name in plan.requests:
        parent, _, leaf = name.rpartition(".")
        root.get_submodule(parent)._modules[leaf] = PerRequest(name, root.get_submodule(name), desk)
    root.register_forward_pre_hook(desk.open, with_kwargs=True)


def reschedule_requests(root: nn.Module, plan: Plan) -> None:
    """Let the desks of this model work by another plan's timesteps."""
    for desk in {module.desk for module in root.modules() if isinstance(module, PerRequest)}:
        desk.take(plan)
