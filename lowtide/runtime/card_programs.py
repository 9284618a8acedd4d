"""The programs of a denoiser on a card: the lowering of the CPU's programs, on Triton kernels.

Between two layers lie codes, or values in the model's own type. Nothing waits for the card: the
running step is an index there. What depends on the timestep and labels alone runs at each call,
because looking up what is known of them would wait.
"""

import inspect
from collections.abc import Mapping
from threading import Lock
from typing import Any

import torch
from torch import nn

from lowtide.models.named_inputs import flat_inputs
from lowtide.nn.attention import QuantAttention
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.nn.swap import packed_layers, quantizers
from lowtide.runtime.covers import COVERS
from lowtide.runtime.float_twin import record_twin
from lowtide.runtime.graphs import Record
from lowtide.runtime.guard import Modules
from lowtide.runtime.layers import NativeLayer, card_layer
from lowtide.runtime.lowering import Lowering
from lowtide.runtime.numbers import Numbers
from lowtide.runtime.on_gpu import GpuLayers
from lowtide.runtime.prepared import TIMESTEP, conditions_of, timestep_tensor, uncollected
from lowtide.runtime.program import Program
from lowtide.runtime.program_store import ProgramStore
from lowtide.runtime.side_layers import SideLayers
from lowtide.runtime.steps import TorchStep
from lowtide.runtime.target import card

Owner = PackedLinear | PackedConv2d | QuantAttention


class CardPrograms:
    """A program for each shape of the inputs. `reasons`: why some layers run in torch."""

    def __init__(self, root: nn.Module, gpu: GpuLayers, record: Record | None = None):
        """`record` captures each program as a CUDA graph; None captures nothing."""
        self.root = root
        self.gpu = gpu
        self.record = record
        self.clock = gpu.clock
        self.device = self.clock.scale.device
        self.parameters = list(inspect.signature(type(root).forward).parameters)[1:]
        self.modules = Modules(root, self.clock)
        self.sides = SideLayers(root)
        self.store = ProgramStore(self._new_program)
        self.lock = Lock()
        self.layers: dict[str, NativeLayer] = {}
        self.reasons = dict(gpu.reasons)
        for name, layer in packed_layers(root):
            if layer not in gpu.layers:
                continue
            if layer.input.format is None:
                self.reasons[name] = "its inputs are in float, so nothing joins its product"
            else:
                self.layers[name] = card_layer(layer)

    def is_stale(self) -> bool:
        """Whether the LoRAs beside the layers are others than those of the programs."""
        return self.modules.have_other_sides(self.sides)

    def run(self, inputs: dict[str, Any]) -> Any:
        """The forward pass on these inputs, by the program of their shapes and settings.

        A graph that is being captured reads the step that was taken before, unless the clock looked
        it up on the device.
        """
        inputs = inputs | {TIMESTEP: timestep_tensor(inputs[TIMESTEP])}
        tensors = flat_inputs(inputs)
        with self.lock:
            program = self.store.program(inputs, tensors)
            if self.clock.keyed:
                self.gpu.take_step()
                program.numbers.step.copy_(self.gpu.step.now)
            owners = self._owners(program)
            with self.gpu.attached(owners):
                return program.run(tensors, None)

    def _owners(self, program: Program) -> list[Owner]:
        """What the program calls as a module: layers with kernels of their own, and attentions."""
        steps = [step for step in program.lowered.steps if isinstance(step, TorchStep)]
        return [owner for step in steps if (owner := _owner(step)) is not None]

    @torch.inference_mode(mode=False)
    @uncollected()
    def _new_program(self, inputs: Mapping[str, Any]) -> Program:
        # Only here, because triton is not installed everywhere.
        from lowtide.runtime.card_launches import Launches

        graph = record_twin(self.root, inputs)
        numbers = Numbers(list(quantizers(self.root).values()), self.clock.steps)
        conditions = conditions_of(graph, self.parameters[0])
        given = (self.root, graph, numbers, self.layers, conditions, COVERS, card(self.device))
        program = Program(Lowering(*given).lower(), numbers, Launches(numbers).of)
        program.record = self.record
        return program


def _owner(step: TorchStep) -> Owner | None:
    """The layer or the attention that a step of torch calls."""
    owner = getattr(step.function, "__self__", step.function)
    kinds = (PackedLinear, PackedConv2d, QuantAttention)
    return owner if isinstance(owner, kinds) else None
