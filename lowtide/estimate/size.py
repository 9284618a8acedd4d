"""Exact size of a checkpoint before it exists: the plan a recipe will arrive at, its skeleton on meta, its file's header."""

import base64
import json
from typing import Any

import torch
from torch import Tensor

from lowtide.checkpoint import file_format
from lowtide.estimate.blueprint import Blueprint
from lowtide.models import Adapter
from lowtide.models.trace import on_meta
from lowtide.nn.plan import FORMAT_VERSION, Plan, summarised
from lowtide.nn.swap import skeleton
from lowtide.settings import Settings
from lowtide.stages.base import Call, Job, Recipe

DTYPES = {
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
WIDEST_FIRST = 8


def planned(
    blueprint: Blueprint, adapter: Adapter, recipe: Recipe, settings: Settings, method: str
) -> Plan:
    """The plan that the recipe will end with. What only data can tell is taken at its most likely."""
    job = Job(None, on_meta(blueprint.model), adapter, settings, method)
    example, times = (
        blueprint.example(settings),
        [value / adapter.ticks for value in blueprint.timesteps(settings)],
    )
    job.calls = [
        Call(round(time * adapter.ticks), example | {"timestep": torch.tensor([time])}, False)
        for time in times
    ]
    for stage in recipe:
        with torch.device("meta"):
            stage.foresee(job)
    return summarised(job.plan, settings)


def checkpoint_bytes(blueprint: Blueprint, plan: Plan) -> dict[str, int]:
    """Bytes of the denoiser's weight file by kind, and in total."""
    with torch.device("meta"):
        model = on_meta(blueprint.model)
        skeleton(model, plan)
    kinds = file_format.account(model)
    header = header_bytes(model.state_dict(), plan)
    return kinds | {"header": header, "total": kinds["total"] + header}


def header_bytes(state: dict[str, Tensor], plan: Plan) -> int:
    """The length of a safetensors header: JSON, widest types first, padded to eight bytes behind a length of eight."""
    hashes = base64.b64encode(bytes(file_format.HASH * len(state))).decode()
    told = {
        file_format.VERSION: str(FORMAT_VERSION),
        file_format.PLAN: plan.to_json(),
        file_format.HASHES: hashes,
    }
    entries: dict[str, Any] = {"__metadata__": told | {"format": "pt"}}
    start = 0
    for name in sorted(state, key=lambda name: (WIDEST_FIRST - state[name].element_size(), name)):
        end = start + state[name].numel() * state[name].element_size()
        entries[name] = {
            "dtype": DTYPES[state[name].dtype],
            "shape": list(state[name].shape),
            "data_offsets": [start, end],
        }
        start = end
    length = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8
