"""A fused denoiser: its forward pass runs programs, one for each shape of its inputs.

The module itself stays as it is: layers, names, state and hooks. Only `forward` is replaced, by a
function that runs a program where it can and the layers where it cannot, and says which.
"""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.kernels import native_library
from lowtide.models.trace import Graph, flat_inputs, mapped, on_meta, record
from lowtide.nn.attention import QuantAttention
from lowtide.nn.clock import find_clock
from lowtide.nn.feature_cache import Cached, ZeroFeatures
from lowtide.nn.float_layers import conv_options, linear_options, replace_module
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.nn.quantized import QuantConv2d, QuantLinear
from lowtide.nn.request_cache import PerRequest
from lowtide.nn.swap import packed_layers, quantizers
from lowtide.runtime.covers import COVERS
from lowtide.runtime.layers import NativeLayer, native_layer
from lowtide.runtime.lowering import Lowering
from lowtide.runtime.numbers import Numbers
from lowtide.runtime.program import NotANumber, Program
from lowtide.runtime.steps import TorchStep

PROGRAMS = 4  # shapes whose programs are kept
TIMESTEP = "timestep"


class Fused:
    """The forward pass of one packed denoiser. It takes the place of `root.forward`.

    Nothing is prepared before the first call, so a copy of the denoiser prepares its own.
    """

    def __init__(self, root: nn.Module):
        self.root = root
        self.active = True
        self.told: set[str] = set()
        self.state: _State | None = None
        functools.update_wrapper(self, self.forward)

    @property
    def forward(self) -> Callable[..., Any]:
        """The forward pass layer by layer."""
        return type(self.root).forward.__get__(self.root)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fused":
        return Fused(copy.deepcopy(self.root, memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self.active:
            return self.forward(*args, **kwargs)
        state = self.prepared()
        inputs = dict(zip(state.parameters, args, strict=False)) | kwargs
        reason = self._plain_reason(state, inputs)
        if not reason:
            try:
                return state.run(inputs)
            except NotANumber:
                reason = "a value in it is not a number"
        self._tell(reason)
        return self.forward(*args, **kwargs)

    def prepared(self) -> "_State":
        if self.state is None or self.state.is_stale():
            self.state = _State(self.root)
        return self.state

    def _tell(self, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            warnings.warn(
                f"{type(self.root).__name__} runs layer by layer: {reason}.", stacklevel=3
            )

    def _plain_reason(self, state: "_State", inputs: Mapping[str, Any]) -> str:
        """Why this call runs layer by layer; empty if it does not."""
        if native_library.native().library is None:
            return native_library.native().reason
        strange = [name for name, value in inputs.items() if not _is_followed(value)]
        if strange:
            return f"it got {strange[0]}, which lowtide does not follow"
        if any(tensor.numel() == 0 for tensor in flat_inputs(inputs).values()):
            return "an input is empty"
        if self.root.training:
            return "it is in training mode"
        if torch.is_grad_enabled() and self._wants_gradients(inputs):
            return "gradients are wanted; call it within torch.no_grad()"
        if torch._C._len_torch_function_stack() or torch.is_autocast_enabled("cpu"):
            return "a mode of torch is active"
        return state.changed()

    def _wants_gradients(self, inputs: Mapping[str, Any]) -> bool:
        tensors = [*flat_inputs(inputs).values(), *self.root.parameters()]
        return any(tensor.requires_grad for tensor in tensors)


class _State:
    """The layers of a denoiser in the order of the kernels, and its programs by shape."""

    def __init__(self, root: nn.Module):
        self.root = root
        self.parameters = list(inspect.signature(type(root).forward).parameters)[1:]
        self.programs: dict[tuple, Program] = {}
        self.clock = find_clock(root)
        self.tables = (self.clock.scale, self.clock.zero, self.clock.timesteps)
        self.modules = list(root.modules())
        self.children = [
            (module._modules, name, child)
            for module in self.modules
            for name, child in module._modules.items()
        ]
        self.floats = float_dtypes(root)
        self.layers: dict[str, NativeLayer] = {}
        self.reasons: dict[str, str] = {}
        for name, layer in packed_layers(root):
            native = native_layer(layer)
            if isinstance(native, NativeLayer):
                self.layers[name] = native
            else:
                self.reasons[name] = native
        packed = [layer for _, layer in packed_layers(root)]
        self.weights = [(layer, layer.weight, layer.weight._version) for layer in packed]

    def is_stale(self) -> bool:
        """Whether a table or a weight has changed since the layers were prepared."""
        clock = self.clock
        current = (clock.scale, clock.zero, clock.timesteps)
        if any(now is not before for now, before in zip(current, self.tables, strict=True)):
            return True
        written = [layer for layer, weight, version in self.weights if weight._version != version]
        for layer in written:
            # Its panels were written into, and the sums beside them are of before.
            layer.hold_codes()
        return any(layer.weight is not weight for layer, weight, _ in self.weights)

    def changed(self) -> str:
        """Why the modules can no longer be run as a program; empty if they can."""
        if self.floats != {torch.float32}:
            return "its float layers are not in float32"
        if self.clock.keyed and self.clock.index.dim():
            return "its samples are at several timesteps"
        if any(children.get(name) is not child for children, name, child in self.children):
            return "its modules were changed"
        hooked = (
            module
            for module in self.modules
            if module is not self.root and (module._forward_hooks or module._forward_pre_hooks)
        )
        module = next(hooked, None)
        return "" if module is None else f"a {type(module).__name__} inside it has a hook"

    def run(self, inputs: dict[str, Any]) -> Any:
        timestep = _as_tensor(inputs[TIMESTEP])
        inputs[TIMESTEP] = timestep
        tensors = flat_inputs(inputs)
        others = [(name, value) for name, value in inputs.items() if _is_setting(value)]
        shapes = [(name, tuple(each.shape), each.dtype) for name, each in tensors.items()]
        key = (*shapes, *sorted(others))
        if key not in self.programs:
            self._keep(key, self._build(inputs))
        program = self.programs[key]
        numbers = program.numbers
        step = self._step()
        numbers.set_step(step)
        conditions = [_content(tensors[name]) for name in program.conditions]
        return program.run(tensors, (step, *conditions))

    def _step(self) -> int:
        """The running step; 0 where nothing depends on it."""
        return int(self.clock.index) if self.clock.keyed else 0

    def _keep(self, key: tuple, program: Program) -> None:
        while len(self.programs) >= PROGRAMS:
            del self.programs[next(iter(self.programs))]
        self.programs[key] = program

    def _build(self, inputs: Mapping[str, Any]) -> Program:
        graph = record_twin(self.root, inputs)
        rounding = list(quantizers(self.root).values())
        numbers = Numbers(rounding, len(self.clock.known))
        conditions = conditions_of(graph, self.parameters[0])
        lowering = Lowering(self.root, graph, numbers, self.layers, conditions, COVERS)
        return Program(lowering.lower(), numbers)


def conditions_of(graph: Graph, sample: str) -> frozenset[str]:
    """The inputs that stay for a while: the timestep, labels, pooled texts. Not sample or text."""
    shapes = {name: graph.values[id].shape for name, id in graph.inputs.items()}
    return frozenset(name for name, shape in shapes.items() if len(shape) < 3 and name != sample)


def _content(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _is_followed(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_followed, value.values()))
    if isinstance(value, Tensor):
        return value.device.type == "cpu"
    return value is None or isinstance(value, bool | int | float | str)


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def float_dtypes(root: nn.Module) -> set[torch.dtype]:
    return {each.dtype for each in root.parameters() if each.dtype.is_floating_point}


def _as_tensor(timestep: Any) -> Tensor:
    if isinstance(timestep, Tensor):
        return timestep
    kind = torch.float64 if isinstance(timestep, float) else torch.int64
    return torch.tensor(timestep, dtype=kind)


def record_twin(root: nn.Module, inputs: Mapping[str, Any]) -> Graph:
    """The forward pass on inputs of these shapes, recorded on a float twin without data."""
    forward = root.__dict__.pop("forward", None)
    try:
        twin = on_meta(root).eval()
    finally:
        if forward is not None:
            root.__dict__["forward"] = forward
    twin._forward_pre_hooks.clear()
    twin._forward_hooks.clear()
    leaves = _float_leaves(twin)
    return record(twin, mapped(dict(inputs), _to_meta), leaves)


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _float_leaves(twin: nn.Module) -> dict[str, nn.Module]:
    """Replace what is packed by float layers of the same shape; returns all layers, by name."""
    for name, module in list(twin.named_modules()):
        if isinstance(module, QuantAttention):
            owner = twin.get_submodule(name.rpartition(".")[0])
            owner.set_processor(module.inner)
        elif isinstance(module, Cached):
            replace_module(twin, name, ZeroFeatures(module.plan.width))
        elif isinstance(module, PerRequest):
            replace_module(twin, name, _float_twin(module.layer))
    for name, module in list(twin.named_modules()):
        if isinstance(module, PackedLinear | PackedConv2d | QuantLinear | QuantConv2d):
            replace_module(twin, name, _float_twin(module))
    kinds = (nn.Linear, nn.Conv2d, ZeroFeatures)
    return {name: module for name, module in twin.named_modules() if isinstance(module, kinds)}


def _float_twin(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Conv2d):
        return nn.Conv2d(**conv_options(module))
    assert isinstance(module, nn.Linear)
    return nn.Linear(**linear_options(module))


def fuse(root: nn.Module) -> None:
    """Run the forward pass of a packed denoiser as programs of native kernels from here on."""
    if fused_forward(root) is None:
        root.__dict__["forward"] = Fused(root)


def unfuse(root: nn.Module) -> None:
    """Run layer by layer again."""
    if fused_forward(root) is not None:
        del root.__dict__["forward"]


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
        yield
    finally:
        fused.active = before


def explain(root: nn.Module) -> dict[str, Any]:
    """For the latest program: how many native calls, and what runs in torch, with counts."""
    fused = fused_forward(root)
    if fused is None or fused.state is None or not fused.state.programs:
        return {}
    program = list(fused.state.programs.values())[-1]
    steps = program.lowered.steps
    torch_steps = [step.name for step in steps if isinstance(step, TorchStep)]
    counts = {name: torch_steps.count(name) for name in dict.fromkeys(torch_steps)}
    return {
        "native": len(steps) - len(torch_steps),
        "torch": counts,
        "arena": program.arena.nbytes,
        "unsupported": fused.state.reasons,
        "sets": native_library.native().instruction_sets(),
    }
