"""Tiny packed pipelines for the tests of exports, and calls of them with other inputs."""

import tiny_pipelines
import torch

import lowtide
from lowtide import sampling
from lowtide.exporting.trial_calls import example_calls, with_times
from lowtide.runtime import plain

FEW = {"steps": 2, "images": 2}
LEARNT = {"iters": 1, "calibration_steps": 2}
KINDS = {
    # A range for all steps; a UNet of convolutions.
    "static": ("ddim", {"method": "minmax", "weights": 8, "inputs": 8}),
    # A range for each step.
    "steps": ("ddim", {"method": "tfmq", "weights": 4, "inputs": 8} | LEARNT),
    # Mixed bits, tables of features, corrections, divisors.
    "best": ("ddim", {"method": "best", "weights": 4, "inputs": 8} | LEARNT),
    # A text.
    "text": ("sd", {"method": "tfmq", "weights": 4, "inputs": 8} | LEARNT),
    "text-minmax": ("sd", {"method": "minmax", "weights": 4, "inputs": 8}),
    # A transformer with labels: features of requests.
    "dit": ("dit", {"method": "best", "weights": 4, "inputs": 8} | LEARNT),
    # Inputs of other shapes: sizes of pictures, positions of tokens without a batch.
    **{
        name: (name, {"method": "minmax", "weights": 4, "inputs": 8})
        for name in ("sdxl", "pixart", "sd3", "flux")
    },
}


def packed(kind: str, folder, **changes) -> lowtide.Quantized:
    """A tiny pipeline of this kind, packed."""
    name, options = KINDS[kind]
    pipe = tiny_pipelines.PIPELINES[name](folder)
    fields = tiny_pipelines.request_fields(name)
    if "size" in fields:
        fields["size"] = 8
    return lowtide.quantize(pipe, **FEW | options | fields | changes)


def other_calls(quantized: lowtide.Quantized, batch: int = 3):
    """Calls that no export has seen, of another batch, and the packed layers' answers."""
    calls = []
    for number, call in enumerate(example_calls(quantized.model, quantized.plan)):
        torch.manual_seed(100 + number)
        calls.append({name: other(name, value, batch) for name, value in call.items()})
    with plain(quantized.model), torch.no_grad():
        answers = [quantized.model(**with_times(call), return_dict=False)[0] for call in calls]
    return calls, answers


def other(name: str, value: torch.Tensor | dict | None, batch: int):
    if value is None or name in ("timestep", "img_ids", "txt_ids"):
        return value
    if isinstance(value, dict):
        return {part: other(part, each, batch) for part, each in value.items()}
    if not value.is_floating_point():
        return torch.arange(5, 5 + batch)
    return torch.randn(batch, *value.shape[1:])


def denoiser_folder(exported: lowtide.Exported, quantized: lowtide.Quantized):
    return exported.folder / sampling.denoiser_name(quantized.pipe)
