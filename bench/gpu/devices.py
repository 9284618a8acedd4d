"""The device against the CPU: three tiny models by a few methods, within stated bounds.

    PYTHONPATH=.:bench python -m gpu.devices --out devices.json

Each model is quantized on the CPU and on the device from the same weights, with products in
float32. What differs is the order of sums. With --device cpu, the other device is the CPU without
oneDNN, which sums in another order too.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import tiny_pipelines
from gpu.part import Row, Sheet, compute_alike, distance, options

import lowtide
from lowtide import sampling
from lowtide.machine import bf16
from lowtide.methods import relevant_options
from lowtide.sampling.pipelines import Pipeline

KINDS = ("ddim", "sd", "dit")
METHODS = ("minmax", "tfmq", "temporal_cache", "best")
OPTIONS = {"steps": 2, "images": 2, "calibration_steps": 1, "iters": 1, "batch": 2}
# Two orders of sums put a few values on the other side of the middle between two codes.
MOST_BYTES = 0.02  # the share of bytes of codes that differ
# A code that differs moves an input by 1/255 of its range, and a 4-bit weight by 1/15.
FARTHEST = {"packed": 0.02, "kernels": 0.02, "quantized": 0.1}  # relative L2 of images


@contextmanager
def sums_of(device: torch.device) -> Iterator[None]:
    with torch.backends.mkldnn.flags(enabled=device.type != "cpu"):
        yield


def moved(pipe: Pipeline, device: torch.device) -> Pipeline:
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.to(device)
    return pipe


def drawn(pipe: Pipeline, kind: str, *, fused: bool) -> torch.Tensor:
    fields = tiny_pipelines.request_fields(kind)
    request = sampling.Request(steps=2, seeds=(5, 6), batch=2, **fields)
    if fused:
        return torch.from_numpy(np.asarray(sampling.images(pipe, request)))
    with lowtide.unfused(pipe):
        return torch.from_numpy(np.asarray(sampling.images(pipe, request)))


def differing_bytes(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    """The share of the bytes of codes that differ."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    others = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if value.dtype == torch.uint8:
            pairs.append((value, others[name].cpu()))
    unequal = sum(int((one != other).sum()) for one, other in pairs)
    return unequal / sum(one.numel() for one, _ in pairs)


def compared(kind: str, method: str, device: torch.device) -> Row:
    fields = tiny_pipelines.request_fields(kind)
    wanted = relevant_options(method, OPTIONS | fields)
    make = tiny_pipelines.PIPELINES[kind]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = lowtide.quantize(make(folder), method=method, **wanted)
        expected = drawn(ours.pipe, kind, fused=False)
        packed = ours.save(folder / "packed")
        with sums_of(device):
            theirs = lowtide.quantize(moved(make(folder), device), method=method, **wanted)
            loaded = moved(lowtide.load(packed, device="cpu"), device)
            images = {
                "packed": drawn(loaded, kind, fused=False),
                "kernels": drawn(loaded, kind, fused=True),
                "quantized": drawn(theirs.pipe, kind, fused=False),
            }
    row: Row = {name: distance(found, expected) for name, found in images.items()}
    row["bytes"] = differing_bytes(ours.model, theirs.model)
    far = [name for name, bound in FARTHEST.items() if not row[name] <= bound]
    if row["bytes"] > MOST_BYTES:
        far.append("bytes")
    return row | ({"failed": f"too far from the CPU: {', '.join(far)}"} if far else {})


def main(arguments: list[str] | None = None) -> int:
    """PASSED if every row is within the bounds."""
    sheet = Sheet("devices", options(__doc__.splitlines()[0], arguments, 50))
    compute_alike()
    bf16.time_in_bf16 = lambda kind: float("inf")
    for method in METHODS[:2] if sheet.tiny else METHODS:
        for kind in KINDS[:1] if sheet.tiny else KINDS:
            labels = {"model": kind, "method": method}
            sheet.measure(labels, lambda k=kind, m=method: compared(k, m, sheet.device), 20)
    return sheet.code()


if __name__ == "__main__":
    sys.exit(main())
