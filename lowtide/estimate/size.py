"""The exact size of a checkpoint before it exists, from the plan that a recipe ends with."""

import base64
import json

import torch
from torch import Tensor

from lowtide.checkpoint import file_format
from lowtide.estimate.blueprint import Blueprint
from lowtide.models import Adapter
from lowtide.models.trace import on_meta
from lowtide.nn.plan import FORMAT_VERSION, Plan, with_summary
from lowtide.nn.swap import skeleton
from lowtide.sampling import ModulePipeline
from lowtide.settings import Settings
from lowtide.stages.base import Call, Job, Recipe

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def planned(
    blueprint: Blueprint, adapter: Adapter, recipe: Recipe, settings: Settings, method: str
) -> Plan:
    """The plan that the recipe ends with; what depends on data takes its most likely value."""
    model = on_meta(blueprint.model)
    pipe = ModulePipeline(model, blueprint.scheduler, shape=())
    example = blueprint.example(settings)
    calls: list[Call] = []
    for timestep in blueprint.timesteps(settings):
        time = timestep / adapter.ticks
        arguments = example | {"timestep": torch.tensor([time])}
        calls.append(Call(round(time * adapter.ticks), arguments, kept=False))
    job = Job(pipe, model, adapter, settings, method, calls=calls, given_role=blueprint.role)
    for stage in recipe:
        with torch.device("meta"):
            stage.predict_plan(job)
    return with_summary(job.plan, settings)


def checkpoint_bytes(blueprint: Blueprint, plan: Plan) -> dict[str, int]:
    """Bytes of the denoiser's weight file by kind, and in total."""
    with torch.device("meta"):
        model = on_meta(blueprint.model)
        skeleton(model, plan)
    kinds = file_format.account(model)
    header = _header_bytes(model.state_dict(), plan)
    return kinds | {"header": header, "total": kinds["total"] + header}


def _header_bytes(state: dict[str, Tensor], plan: Plan) -> int:
    """The length of a safetensors header.

    It is JSON, with the tensors of the widest types first, padded to eight bytes, after eight bytes
    for its length.
    """
    hashes = base64.b64encode(bytes(file_format.HASH * len(state))).decode()
    metadata = {
        file_format.VERSION: str(FORMAT_VERSION),
        file_format.PLAN: plan.to_json(),
        file_format.HASHES: hashes,
        "format": "pt",
    }
    entries: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    length = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8
