"""One of lowtide's own variants in a process of its own.

    python -m lowtide.workflows.speed_bench.variant ORDER

ORDER is JSON: the variant's name, its model, the file of the calls, the threads, and for the packed
model, which writes that file, the batch.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowtide import runtime, sampling
from lowtide.checkpoint import facts, folders, provenance
from lowtide.errors import BadInput
from lowtide.runtime import timing
from lowtide.sampling.pipelines import Pipeline
from lowtide.workflows.speed_bench import calls
from lowtide.workflows.speed_bench.channel import Answer, Running, serve

PACKED = "packed"
PLAIN = "plain"
FLOAT = "float"
HALF = "torch-bf16"
COMPILED = "compile"


class _Recorded(Exception):
    """The first call of the denoiser was recorded; the pipeline need not go on."""


def load(order: Answer) -> Running:
    """Load the variant that was ordered."""
    name = order["variant"]
    folders.recover_missing(order["model"])
    pipe = sampling.load_pipeline(order["model"])
    model = sampling.denoiser(pipe).eval().requires_grad_(False)
    _check(model, order)
    path = Path(order["calls"])
    if name == PACKED:
        calls.write(path, recorded_calls(pipe, order))
    del pipe
    arguments = [_as_tensors(each) for each in calls.read(path)]
    if name == HALF:
        model.to(torch.bfloat16)
        arguments = [_halved(each) for each in arguments]
    act: Any = torch.compile(model) if name == COMPILED else model
    within = runtime.plain if name == PLAIN else nullcontext

    @torch.no_grad()
    def step(call: int) -> None:
        with within(model):
            act(**arguments[call])

    orders = _orders(name, model, step)
    orders["timesteps"] = lambda order: {"timesteps": len(arguments)}
    forget = (lambda: timing.forget_features(model)) if name == PACKED else None
    return Running(step, forget, orders)


def _check(model: nn.Module, order: Answer) -> None:
    """lowtide's variants are packed, all others are in float."""
    packed = bool(facts.packed_plan(model).summary)
    if order["variant"] in (PACKED, PLAIN) and not packed:
        raise BadInput(
            f"found no packed model in {order['model']}",
            "a folder that lowtide quantize wrote",
            "quantize it first: lowtide quantize MODEL --out FOLDER",
        )
    if order["variant"] not in (PACKED, PLAIN) and getattr(model, "is_quantized", packed):
        raise BadInput(
            f"found a quantized model in {order['model']}",
            "the float model to compare with",
            "give it with --float MODEL",
        )


def _orders(
    name: str, model: nn.Module, step: Callable[[int], None]
) -> dict[str, Callable[[Answer], Answer]]:
    """What the variant can be asked for besides steps."""
    if name == PACKED:
        return {"parts": lambda order: _packed_parts(model, step, order["repeats"])}
    if name == FLOAT:
        return {"parts": lambda order: asdict(timing.call_times(lambda: step(0), order["repeats"]))}
    return {}


def _packed_parts(model: nn.Module, step: Callable[[int], None], repeats: int) -> Answer:
    def first_visit() -> None:
        timing.forget_features(model)
        step(0)

    parts = timing.program_times(model, first_visit, repeats)
    machine = {"peak": timing.peak_rate(), "sets": runtime.explain(model)["sets"]}
    return asdict(parts) | machine


def recorded_calls(pipe: Pipeline, order: Answer) -> list[dict[str, Any]]:
    """The first call of the denoiser at some of the calibrated timesteps, evenly spread."""
    record = provenance.read(sampling.local_folder(order["model"]))
    model = sampling.denoiser(pipe)
    plan = facts.packed_plan(model)
    settings = record.settings if record else {}
    first = _first_call(pipe, _request(pipe, settings, plan.summary["steps"], order["batch"]))
    times = plan.times or [timestep / plan.ticks for timestep in plan.timesteps]
    count = min(order["most"], len(times))
    chosen = [times[len(times) * number // count] for number in range(count)]
    timestep = torch.as_tensor(first["timestep"])
    copies = (first | {"timestep": torch.full_like(timestep, time)} for time in chosen)
    return [_as_arrays(copy) for copy in copies]


def _request(
    pipe: Pipeline, settings: Mapping[str, Any], steps: Any, batch: int
) -> sampling.Request:
    """A batch of images as the calibration drew them; the first class where there are classes."""
    fields = sampling.supported_fields(pipe)
    given = {name: settings[name] for name in fields if settings.get(name)}
    if "labels" in fields:
        given.setdefault("labels", (0,))
    return sampling.Request(steps=steps, seeds=tuple(range(batch)), batch=batch, **given)


def _first_call(pipe: Pipeline, request: sampling.Request) -> dict[str, Any]:
    recorded: dict[str, Any] = {}
    model = sampling.denoiser(pipe)
    names = tuple(inspect.signature(model.forward).parameters)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded.update(dict(zip(names, args, strict=False)) | kwargs)
        raise _Recorded

    hook = model.register_forward_pre_hook(record, prepend=True, with_kwargs=True)
    try:
        sampling.run_pipeline(pipe, request)
    except _Recorded:
        return recorded
    finally:
        hook.remove()
    raise AssertionError("the pipeline did not call its denoiser")


def _as_arrays(values: Mapping[str, Any]) -> dict[str, Any]:
    arrays = {
        name: each.detach().numpy() if isinstance(each, Tensor) else each
        for name, each in calls.flattened(values).items()
    }
    return calls.nested(arrays)


def _as_tensors(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the denoiser, as it takes them."""
    tensors = {
        name: torch.from_numpy(each) if calls.is_array(each) else each
        for name, each in flat.items()
    }
    return calls.nested(tensors)


def _halved(values: Any) -> Any:
    """Float inputs in bfloat16; the timestep stays as it is."""
    if isinstance(values, dict):
        return {
            name: each if name == "timestep" else _halved(each) for name, each in values.items()
        }
    is_float = isinstance(values, Tensor) and values.is_floating_point()
    return values.to(torch.bfloat16) if is_float else values


def _import_classes(source: str) -> None:
    """Import what the model needs before its loading is timed: diffusers imports late."""
    folder = sampling.local_folder(source)
    index = folder / "model_index.json" if folder else None
    if index is None or not index.is_file():
        return
    for library, name in filter(_names_class, json.loads(index.read_text()).values()):
        with suppress(ImportError):
            getattr(importlib.import_module(library), name, None)


def _names_class(value: Any) -> bool:
    """Whether an entry of a model_index.json is a library and a class of it."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(e, str) for e in value)


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    _import_classes(order["model"])
    serve(lambda: load(order))


if __name__ == "__main__":
    main()
