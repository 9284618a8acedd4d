"""A fused denoiser: its forward pass runs programs, one for each shape of its inputs.

The module itself stays as it is: layers, names, state and hooks. Only `forward` is replaced, by a
function that runs a program where it can and the layers where it cannot, and says which.
"""

import copy
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lowtide.errors import BadInput
from lowtide.kernels import native_library
from lowtide.kernels.race import PLAIN
from lowtide.nn.swap import packed_layers
from lowtide.runtime.card_programs import CardPrograms
from lowtide.runtime.graphs import Record, record_graph
from lowtide.runtime.guard import (
    compiled_parts,
    placed_by_hooks,
    unfollowed_inputs,
    unfollowed_mode,
)
from lowtide.runtime.on_gpu import GpuLayers, failure_of
from lowtide.runtime.onednn_layer import on_onednn
from lowtide.runtime.prepared import Prepared
from lowtide.runtime.program import NotANumber
from lowtide.runtime.steps import TorchStep
from lowtide.runtime.writes import Unfollowed


def is_card(device: torch.device) -> bool:
    """Whether programs of this device run on Triton kernels."""
    return device.type == "cuda"


class Fused:
    """The forward pass of one packed denoiser. It takes the place of `root.forward`.

    Nothing is prepared before the first call, so a copy of the denoiser prepares its own.
    """

    def __init__(self, root: nn.Module, engine: str | None = None):
        self.root = root
        self.engine = engine
        self.active = True
        self.kept: dict[str, str] | None = None
        self.told: set[str] = set()
        self.state: Prepared | None = None
        self.on_gpu: GpuLayers | None = None
        self.programs: CardPrograms | None = None
        self.record: Record | None = None
        # Why no kernel of a program runs, after one did not fit on the card.
        self.failure = ""
        functools.update_wrapper(self, self.forward)
        self.__code__ = self.forward.__code__  # torch.export reads the parameters from it

    @property
    def forward(self) -> Callable[..., Any]:
        """The forward pass layer by layer."""
        return type(self.root).forward.__get__(self.root)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds no program; the loaded denoiser prepares its own."""
        return Fused, (self.root, self.engine)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fused":
        copied = Fused(copy.deepcopy(self.root, memo), self.engine)
        copied.record = self.record
        return copied

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active or self.engine == PLAIN:
            return self.forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            # A graph of the layers' operators, so that the compiler sees what lies between them.
            self.prepare_compiled()
            return self.forward(*args, **kwargs)
        device = next(self.root.parameters()).device
        if placed := placed_by_hooks(self.root):
            self._tell(placed)
            return self.forward(*args, **kwargs)
        if compiled := compiled_parts(self.root):
            self._tell(compiled)
            self.prepare_compiled()
            return self.forward(*args, **kwargs)
        if is_card(device):
            return self.on_card(*args, **kwargs)
        if device.type != "cpu":
            return self.forward(*args, **kwargs)
        state = self.prepared()
        inputs = dict(zip(state.parameters, args, strict=False)) | kwargs
        reason = self._plain_reason(state, inputs)
        library = native_library.native()
        if not reason and library.library is None:
            self._tell(
                f"{library.reason}; oneDNN runs its products" if state.products else library.reason
            )
            with on_onednn(state.products):
                return self.forward(*args, **kwargs)
        if not reason:
            try:
                with on_onednn(state.products):
                    return state.run(inputs)
            except NotANumber:
                reason = "a value in it is not a number"
            except Unfollowed as found:
                reason = str(found)
        self._tell(reason)
        return self.forward(*args, **kwargs)

    @torch.compiler.assume_constant_result
    def prepare_compiled(self) -> bool:
        """Before torch.compile follows the layers: on a card they call kernels from now on."""
        if is_card(next(self.root.parameters()).device):
            self.gpu_layers().attach()
        return True

    def on_card(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass as a program of Triton kernels; layer by layer where none can run."""
        layers = self.gpu_layers()
        programs = self.card_programs(layers)
        if not programs.layers:
            # Why no layer has a kernel has been said.
            with layers.running():
                return self.forward(*args, **kwargs)
        inputs = dict(zip(programs.parameters, args, strict=False)) | kwargs
        reason = (
            unfollowed_inputs(inputs, programs.device)
            or unfollowed_mode(self.root, inputs)
            or programs.modules.unfollowed()
            or self.failure
        )
        if not reason:
            try:
                return programs.run(inputs)
            except Unfollowed as found:
                reason = str(found)
            except layers.failures() as error:
                self.failure = failure_of(error)
                reason = self.failure
        self._tell(reason)
        with layers.running():
            return self.forward(*args, **kwargs)

    @torch.inference_mode(mode=False)
    def card_programs(self, layers: GpuLayers) -> CardPrograms:
        """The programs on these kernels; new ones after a weight, a table or a LoRA has changed."""
        programs = self.programs
        if programs is None or programs.gpu is not layers or programs.is_stale():
            programs = CardPrograms(self.root, layers, self.record)
            self.programs = programs
            self.failure = ""
        return programs

    @torch.inference_mode(mode=False)
    def gpu_layers(self) -> GpuLayers:
        """The kernels of the denoiser on its GPU, and why some of its layers have none."""
        if self.on_gpu is None or self.on_gpu.is_stale():
            self.on_gpu = GpuLayers(self.root)
            for reason in dict.fromkeys(self.on_gpu.reasons.values()):
                count = list(self.on_gpu.reasons.values()).count(reason)
                self._tell_layers(count, reason)
        return self.on_gpu

    def _tell_layers(self, count: int, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            name = type(self.root).__name__
            warnings.warn(f"{count} layers of {name} run in plain torch: {reason}.", stacklevel=4)

    @torch.inference_mode(mode=False)  # what is prepared is there for calls without that mode too
    def prepared(self) -> Prepared:
        if self.state is None or self.state.is_stale():
            self.state = Prepared(self.root, self.engine, self.kept)
        return self.state

    def _tell(self, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            warnings.warn(
                f"{type(self.root).__name__} runs layer by layer: {reason}.", stacklevel=3
            )

    def _plain_reason(self, state: Prepared, inputs: Mapping[str, Any]) -> str:
        """Why this call runs layer by layer; empty if it does not."""
        return (
            unfollowed_inputs(inputs)
            or unfollowed_mode(self.root, inputs)
            or state.modules.unfollowed()
        )


def fuse(root: nn.Module, engine: str | None = None) -> None:
    """Run the forward pass of a packed denoiser as programs from here on.

    `engine`: "native", "onednn" or "plain" for all products that it can run; None races them.
    A denoiser without packed layers stays as it is. Packed layers have no gradients, so no other
    parameter asks for any.
    """
    if not any(packed_layers(root)):
        return
    root.requires_grad_(False)
    fused = fused_forward(root)
    if fused is None and "forward" in root.__dict__:
        return  # a hook of accelerate or diffusers stands there, and moves what the layers need
    if fused is None or fused.engine != engine:
        root.__dict__["forward"] = Fused(root, engine)


def unfuse(root: nn.Module) -> None:
    """Run layer by layer again."""
    if fused_forward(root) is not None:
        del root.__dict__["forward"]


def keep_engines(root: nn.Module, kept: dict[str, str]) -> None:
    """Run each product of a fused denoiser on the kernel that `kept` names for its shape.

    Those of other shapes are raced and added. On a card there is one engine.
    """
    fused = fused_forward(root)
    if fused is not None:
        fused.kept = kept
        fused.state = None


def capture(root: nn.Module, record: Record = record_graph) -> None:
    """On a CUDA card, run the programs of a fused denoiser as CUDA graphs from here on.

    The first call of each shape records a graph; the others replay it. `record` does so.
    """
    fused = fused_forward(root)
    if fused is None:
        raise BadInput("found a denoiser that is not fused", "a fused one", "call fuse() before")
    fused.record = record
    fused.programs = None


def fused_forward(root: nn.Module) -> Fused | None:
    forward = root.__dict__.get("forward")
    return forward if isinstance(forward, Fused) else None


def is_fused(root: nn.Module) -> bool:
    return fused_forward(root) is not None


@contextmanager
def plain(root: nn.Module) -> Iterator[None]:
    """Within the context, the denoiser runs layer by layer."""
    fused = fused_forward(root)
    if fused is None:
        yield
        return
    before = fused.active
    fused.active = False
    try:
        with nullcontext() if fused.on_gpu is None else fused.on_gpu.left_out():
            yield
    finally:
        fused.active = before


def explain(root: nn.Module) -> dict[str, Any]:
    """For the latest program: how many calls of our kernels, and what runs in torch, with counts.

    `kernels`: the calls of each kernel; `sets`: the instruction sets of a CPU.
    """
    fused = fused_forward(root)
    state = None if fused is None else fused.programs or fused.state
    if state is None or not state.store.programs:
        return {}
    program = list(state.store.programs.values())[-1]
    steps = program.lowered.steps
    torch_steps = [step.name for step in steps if isinstance(step, TorchStep)]
    kinds = [type(step).__name__ for step in steps if not isinstance(step, TorchStep)]
    is_on_card = isinstance(state, CardPrograms)
    return {
        "native": len(kinds),
        "kernels": dict(Counter(kind.removesuffix("Step") for kind in kinds)),
        "torch": dict(Counter(torch_steps)),
        "arena": program.arena.nbytes,
        "unsupported": state.reasons,
        "sets": [] if is_on_card else native_library.native().instruction_sets(),
    }
