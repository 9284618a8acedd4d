"""Exact size of a checkpoint before it exists: the plan a recipe will arrive at, its skeleton on meta, its file's header."""

import base64
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.checkpoint import file_format
from lowtide.estimate.blueprint import Blueprint
from lowtide.formats import Adaptive, Affine, Mixed
from lowtide.methods.mpq import OMQ, SHARE, mixes
from lowtide.methods.ptqd import CNC, VSC, Bias
from lowtide.methods.qdiffusion import Split
from lowtide.methods.tcaq import DAQ, TCR
from lowtide.methods.temporal_cache import Maintain, cacheable, silence
from lowtide.methods.tfmq import FSC
from lowtide.models import Adapter, Unit
from lowtide.models.trace import on_meta
from lowtide.nn.correction import channel_axis
from lowtide.nn.plan import FORMAT_VERSION, CachePlan, Plan, summarised
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.swap import quant_layers, skeleton
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Call, Job, Recipe
from lowtide.stages.model_edits import answer_once, cache_layer
from lowtide.stages.pack import Pack, drop_silent

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
    """The plan that the recipe will end with. What only data can tell is taken at its most likely, see FOLLOW."""
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
        if type(stage) in FOLLOW:
            with torch.device("meta"):
                FOLLOW[type(stage)](stage, job)
    return summarised(job.plan, settings)


def follow_tcr(stage: TCR, job: Job) -> None:
    """Every convolution keeps its divisors, unless a norm in front takes them in: the most that TCR can come to."""
    for name, layer in quant_layers(job.model):
        if (
            stage.suits(layer)
            and name in job.adapter.reads
            and job.adapter.norm_before(name) is None
        ):
            job.plan.layers[name] = replace(job.plan.layers[name], smooth=True)


def follow_maintain(stage: Maintain, job: Job) -> None:
    """Every feature cached at every step, which is how it mostly ends; a block that reads more than t answers once."""
    for unit in job.adapter.temporal():
        if cacheable(job, unit):
            follow_cache(job, unit)
        elif unit.reads != ("timestep",) and unit.features:
            answer_once(job, unit)


def follow_cache(job: Job, unit: Unit) -> None:
    bits, kept = job.settings.inputs, job.settings.keep_temporal
    form = Affine(bits, False, 0) if bits <= 8 else None
    for name in unit.features:
        chunks = job.adapter.chunks(name) if form else 1
        cache_layer(
            job, name, CachePlan(job.adapter.all_layers[name].out_features, form, chunks, kept=kept)
        )
    silence(job, unit, computed=False)


def follow_omq(stage: OMQ, job: Job) -> None:
    """As if no channel's bits moved, which is how most layers end and what only data can tell; MPQ-DM+ moves a tenth in each."""
    for name, layer in quant_layers(job.model):
        plain = not isinstance(layer, nn.Conv2d) or layer.groups == 1
        if not (layer.format and plain) or name in job.adapter.ends():
            continue
        job.plan.layers[name] = replace(job.plan.layers[name], smooth=stage.smooth)
        if stage.mix and stage.plus and mixes(layer.format, len(layer.weight)):
            job.plan.layers[name] = replace(job.plan.layers[name], weight=raised(name, layer))


def raised(name: str, layer: QuantizedLayer) -> Mixed:
    """Which tenth it is differs by layer, so that the plan cannot say it once for several, nor we."""
    rows, bits = len(layer.weight), layer.format.bits
    found = [bits + 1] * (rows // SHARE) + [bits] * (rows - rows // SHARE)
    random.Random(name).shuffle(found)
    return Mixed(tuple(found), signed=False)


def follow_daq(stage: DAQ, job: Job) -> None:
    for name, parts in job.plan.attentions.items():
        either = replace(parts["softmax"], input=Adaptive(job.settings.inputs))
        job.plan.attentions[name] = parts | {"softmax": either}


def follow_correction(stage: CNC | Bias | VSC, job: Job) -> None:
    """A table row for each channel of the noise that is answered, which are those of the image that is asked about."""
    asked = job.calls[0].arguments[job.adapter.parameters[0]]
    job.plan = replace(job.plan, corrected=asked.shape[channel_axis(asked)])


# What each stage does to the plan; a stage that is not here leaves it alone.
FOLLOW: dict[type, Callable[[Any, Job], None]] = {
    Assign: Assign.run,
    TCR: follow_tcr,
    Maintain: follow_maintain,
    OMQ: follow_omq,
    DAQ: follow_daq,
    Split: Split.run,
    FSC: FSC.run,
    CNC: follow_correction,
    Bias: follow_correction,
    VSC: follow_correction,
    Pack: lambda stage, job: drop_silent(job),
}


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
