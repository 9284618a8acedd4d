"""One denoiser call of SD 1.5, DiT-XL/2 and SDXL with random weights: ours, bf16, torchao.

    PYTHONPATH=.:bench python -m gpu.steps --out steps.json

Times are medians of replayed CUDA graphs. Ours run as one program; `w8a8-layers` runs layer by
layer on the same kernels. `kernels`, `in_torch`: the steps of a program, by kind and by call of
torch. `error`: the relative L2 of our kernels from the same packed layers in plain torch.
`float_error`: from the bf16 model. What takes long to prepare comes last, because the time may be
over before.
"""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from gpu.networks import NAMES, inputs_of, network, packed
from gpu.part import Row, Sheet, distance, milliseconds, options, synchronize
from torch import nn

from lowtide import runtime
from lowtide.models import Arguments, answer_of
from lowtide.runtime.on_gpu import GpuLayers

BATCHES = (2, 8, 16)
OURS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a16": (4, 16), "w8a8-layers": (8, 8)}
LAYERS = "w8a8-layers"
QUICK = ("bf16", *OURS)
COMPILED = ("bf16-compile", "torchao-int8")
LONGEST = 100


@dataclass
class Prepared:
    """A variant of a model; `layers`: our kernels, if it runs layer by layer on them.

    inputs: of each batch, made from the float model, whose parameters tell their type.
    """

    model: nn.Module
    inputs: dict[int, Arguments]
    call: Callable[..., Any]
    layers: GpuLayers | None = None


class Bench:
    """Prepares one variant at a time, and times it."""

    def __init__(self, sheet: Sheet):
        self.sheet = sheet
        self.device = sheet.device
        self.key: tuple[str, str] | None = None
        self.held: Prepared | None = None

    def prepared(self, name: str, variant: str) -> Prepared:
        """The variant; the one before is dropped, so that the peak is this one's."""
        if self.key != (name, variant) or self.held is None:
            self.held = None
            self.key = (name, variant)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.held = self.make(name, variant)
        return self.held

    def make(self, name: str, variant: str) -> Prepared:
        model = network(name, self.device, torch.bfloat16, tiny=self.sheet.tiny)
        inputs = {batch: inputs_of(model, batch) for batch in BATCHES}
        if variant in OURS:
            packed(model, *OURS[variant])
            # Without the hook that sets the clock: all steps share a range here.
            if variant == LAYERS:
                call = type(model).forward.__get__(model)
                return Prepared(model, inputs, call, GpuLayers(model))
            runtime.fuse(model)
            return Prepared(model, inputs, model.forward)
        if variant == "torchao-int8":
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(model, Int8DynamicActivationInt8WeightConfig())
        if variant in COMPILED:
            torch.compiler.reset()
            # A test on a CPU checks that the model can be compiled, and spares the compiler.
            backend = "inductor" if self.device.type == "cuda" else "eager"
            return Prepared(model, inputs, torch.compile(model, backend=backend, dynamic=False))
        return Prepared(model, inputs, model)

    @torch.no_grad()
    def row(self, name: str, variant: str, batch: int) -> Row:
        started = time.monotonic()
        found = self.prepared(name, variant)
        inputs = found.inputs[batch]
        row: Row = {"prepare_s": round(time.monotonic() - started, 1)}
        row["weights_mb"] = round(held_bytes(found.model) / 1e6, 1)
        running = nullcontext() if found.layers is None else found.layers.running()
        with running:
            if variant in OURS and batch == BATCHES[0]:
                row |= self.errors(name, found, inputs)
            row |= self.times(found.call, inputs)
        return row | ran(found)

    def errors(self, name: str, found: Prepared, inputs: Arguments) -> Row:
        """Our kernels against plain torch, and against the float model of the same seed."""
        ours = answer_of(found.call(**inputs)).float()
        plain_layers = runtime.plain if found.layers is None else left_out(found.layers)
        with plain_layers(found.model):
            plain = answer_of(found.call(**inputs)).float()
        floating = network(name, self.device, torch.bfloat16, tiny=self.sheet.tiny)
        expected = answer_of(floating(**inputs)).float()
        return {"error": distance(ours, plain), "float_error": distance(ours, expected)}

    def times(self, call: Callable[..., Any], inputs: Arguments) -> Row:
        """Memory at the peak of a call, and times of a call and of a replayed graph."""
        if self.device.type != "cuda":
            call(**inputs)
            return {"eager_ms": milliseconds(lambda: call(**inputs), self.device, 3)}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        started = time.monotonic()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        synchronize(self.device)
        row: Row = {"first_s": round(time.monotonic() - started, 1)}
        torch.cuda.reset_peak_memory_stats()
        row["eager_ms"] = milliseconds(lambda: call(**inputs), self.device, 5)
        row["peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(**inputs)
        for _ in range(3):
            graph.replay()
        row["ms"] = milliseconds(graph.replay, self.device)
        return row


def left_out(layers: GpuLayers) -> Callable[[nn.Module], AbstractContextManager[None]]:
    return lambda model: layers.left_out()


def ran(found: Prepared) -> Row:
    """What ran where: the layers that no kernel of ours runs, and the steps of the program."""
    if found.layers is not None:
        return {"plain_layers": len(found.layers.reasons)}
    told = runtime.explain(found.model)
    if not told:
        return {}
    counts = {"kernels": told["kernels"], "in_torch": told["torch"]}
    return {"plain_layers": len(told["unsupported"]), **counts}


def held_bytes(model: nn.Module) -> int:
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


def main(arguments: list[str] | None = None) -> int:
    """PASSED if all rows ran; torchao's are left out where it is not installed."""
    sheet = Sheet("steps", options(__doc__.splitlines()[0], arguments, 170))
    torch.backends.cudnn.benchmark = True
    bench = Bench(sheet)
    batches = BATCHES[:1] if sheet.tiny else BATCHES
    names = NAMES[:2] if sheet.tiny else NAMES
    orders = [(name, variant) for name in names for variant in QUICK]
    orders += [(name, variant) for variant in COMPILED for name in ("dit-xl-2", "sd15", "sdxl")]
    for name, variant in orders:
        for batch in batches:
            if name not in names:
                continue
            labels = {"model": name, "variant": variant, "batch": batch}
            run = lambda of=labels: bench.row(of["model"], of["variant"], of["batch"])  # noqa: E731
            if variant == "torchao-int8" and find_spec("torchao") is None:
                run = lambda: {"skipped": "torchao is not installed"}  # noqa: E731
            sheet.measure(labels, run, LONGEST)
    return sheet.code()


if __name__ == "__main__":
    sys.exit(main())
