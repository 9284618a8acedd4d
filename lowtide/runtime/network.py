"""A fused denoiser: its forward pass runs programs, one for each shape of its inputs.

The module itself stays as it is: layers, names, state and hooks. Only `forward` is replaced, by a
function that runs a program where it can and the layers where it cannot, and says which.
"""

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
from lowtide.runtime.layers import native_layer
from lowtide.runtime.lowering import Lowering, NativeLayer, Numbers
from lowtide.runtime.program import NotANumber, Program
from lowtide.runtime.steps import TorchStep

FUSED = "_lowtide_fused"
PROGRAMS = 4  # shapes whose programs are kept
TIMESTEP = "timestep"


class Fused:
    """The programs of one denoiser."""

    def __init__(self, root: nn.Module):
        self.root = root
        self.forward = root.forward
        self.parameters = list(inspect.signature(root.forward).parameters)
        self.active = True
        self.shapes: dict[tuple, Program] = {}
        self.reasons: dict[str, str] = {}
        self.told: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Look at the layers again, and build programs anew."""
        self.shapes.clear()
        self.layers: dict[str, NativeLayer] | None = None
        self.modules = [(each, each._modules) for each in self.root.modules()]
        self.children = [
            (children, name, child)
            for _, children in self.modules
            for name, child in children.items()
        ]
        self.clock = find_clock(self.root)
        self.tables = (self.clock.scale, self.clock.zero)
        self.versions = [(layer.weight, layer.weight._version) for _, layer in packed_layers(self.root)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self.active:
            return self.forward(*args, **kwargs)
        inputs = dict(zip(self.parameters, args, strict=False)) | kwargs
        reason = self._plain_reason(inputs)
        if not reason:
            try:
                return self._run(inputs)
            except NotANumber:
                reason = "an input holds NaN"
        self._tell(reason)
        return self.forward(*args, **kwargs)

    def _tell(self, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            warnings.warn(f"{type(self.root).__name__} runs layer by layer: {reason}.", stacklevel=3)

    def _plain_reason(self, inputs: Mapping[str, Any]) -> str:
        """Why this call runs layer by layer; empty if it does not."""
        strange = [name for name, value in inputs.items() if not _is_followed(value)]
        if strange:
            return f"it got {strange[0]}, which lowtide does not follow"
        if self.root.training:
            return "it is in training mode"
        if torch.is_grad_enabled() and self._wants_gradients(inputs):
            return "gradients are wanted; call it within torch.no_grad()"
        if torch._C._len_torch_function_stack() or torch.is_autocast_enabled("cpu"):
            return "a mode of torch is active"
        if self.clock.keyed and self.clock.index.dim():
            return "its samples are at several timesteps"
        return self._changed()

    def _wants_gradients(self, inputs: Mapping[str, Any]) -> bool:
        tensors = [*flat_inputs(inputs).values(), *self.root.parameters()]
        return any(tensor.requires_grad for tensor in tensors)

    def _changed(self) -> str:
        """What differs from when the programs were built."""
        if any(children.get(name) is not child for children, name, child in self.children):
            return "its modules were changed"
        hooked = (
            module
            for module, _ in self.modules
            if module is not self.root and (module._forward_hooks or module._forward_pre_hooks)
        )
        module = next(hooked, None)
        if module is not None:
            return f"a {type(module).__name__} inside it has a hook"
        if self.tables[0] is not self.clock.scale or self.tables[1] is not self.clock.zero:
            self.forget()
        if any(weight._version != version for weight, version in self.versions):
            self.forget()
        return ""

    def _run(self, inputs: dict[str, Any]) -> Any:
        timestep = _as_tensor(inputs[TIMESTEP])
        inputs[TIMESTEP] = timestep
        tensors = flat_inputs(inputs)
        others = [(name, value) for name, value in inputs.items() if _is_setting(value)]
        shapes = [(name, tuple(each.shape), each.dtype) for name, each in tensors.items()]
        key = (*shapes, *sorted(others))
        if key not in self.shapes:
            self._keep(key, self._build(inputs))
        program = self.shapes[key]
        numbers = program.numbers
        step = self._step()
        numbers.now.copy_(numbers.table[step])
        conditions = [_content(tensors[name]) for name in program.conditions]
        return program.run(tensors, (step, *conditions))

    def _step(self) -> int:
        """The running step; 0 where nothing depends on it."""
        return int(self.clock.index) if self.clock.keyed else 0

    def _keep(self, key: tuple, program: Program) -> None:
        while len(self.shapes) >= PROGRAMS:
            del self.shapes[next(iter(self.shapes))]
        self.shapes[key] = program

    def _build(self, inputs: Mapping[str, Any]) -> Program:
        graph = record_twin(self.root, inputs)
        rounding = list(quantizers(self.root).values())
        numbers = Numbers(rounding, len(self.clock.known))
        conditions = conditions_of(graph, self.parameters[0])
        lowering = Lowering(self.root, graph, numbers, self._native_layers(), conditions)
        return Program(lowering.lower(), numbers)

    def _native_layers(self) -> dict[str, NativeLayer]:
        if self.layers is None:
            self.layers = {}
            for name, layer in packed_layers(self.root):
                native = native_layer(layer)
                if isinstance(native, NativeLayer):
                    self.layers[name] = native
                else:
                    self.reasons[name] = native
        return self.layers


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
    if is_fused(root):
        return
    fused = Fused(root)
    replacement: Callable = functools.wraps(root.forward)(
        lambda *args, **kwargs: fused(*args, **kwargs)
    )
    root.__dict__[FUSED] = fused
    root.__dict__["forward"] = replacement


def unfuse(root: nn.Module) -> None:
    """Run layer by layer again."""
    if is_fused(root):
        del root.__dict__["forward"]
        del root.__dict__[FUSED]


def is_fused(root: nn.Module) -> bool:
    return FUSED in root.__dict__


@contextmanager
def plain(root: nn.Module) -> Iterator[None]:
    """Within the context, the denoiser runs layer by layer."""
    fused = root.__dict__.get(FUSED)
    if fused is not None:
        fused.active = False
    try:
        yield
    finally:
        if fused is not None:
            fused.active = True


def explain(root: nn.Module) -> dict[str, Any]:
    """For the latest program: how many native calls, and what runs in torch, with counts."""
    fused = root.__dict__.get(FUSED)
    if fused is None or not fused.shapes:
        return {}
    program = list(fused.shapes.values())[-1]
    steps = program.lowered.steps
    torch_steps = [step.name for step in steps if isinstance(step, TorchStep)]
    counts = {name: torch_steps.count(name) for name in dict.fromkeys(torch_steps)}
    return {
        "native": len(steps) - len(torch_steps),
        "torch": counts,
        "arena": program.arena.nbytes,
        "unsupported": fused.reasons,
        "sets": native_library.native().instruction_sets(),
    }
