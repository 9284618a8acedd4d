"""Placement: a denoiser whose blocks lie on the CPU, and visit the device one at a time.

Everything outside of the blocks stays on the device: embeddings, norms, the first and the last
layer. A block, or a part of one that is called alone, comes to the device when it is called, and
leaves when it has answered. Whoever works on its weights without calling it, or calls it many
times, keeps it there with `visit`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowtide.formats import Grid
from lowtide.machine.devices import CPU, empty_cache, moved_to_cpu
from lowtide.nn.quantized import QuantizedLayer


class _Home(NamedTuple):
    """A tensor on the CPU, and what its copy on the device was when it was made."""

    tensor: Any
    owner: Tensor
    address: int
    version: int

    def is_that_of(self, owner: Tensor) -> bool:
        """Whether nothing has changed the copy."""
        return self.address == owner.data_ptr() and self.version == owner._version


_Homes = dict[int, _Home]


class Placement:
    """Where the parts of a denoiser are. Without blocks, it is all on the device."""

    def __init__(self, root: nn.Module, device: torch.device, blocks: tuple[str, ...] = ()):
        """Move everything to its place; `blocks` are the names of those that lie on the CPU."""
        self.root = root
        self.device = device
        self.blocks = blocks
        self._visitors: set[nn.Module] = set()
        self._visits: dict[nn.Module, list[ExitStack]] = {}
        self._hooks: list[RemovableHandle] = []
        if self.blocks:
            self._settle()

    def _settle(self) -> None:
        placed = self._placed()
        for module in placed:
            _move(module, CPU, {})
        for module in self.root.modules():
            if module not in placed:
                _move(module, self.device, {})
        # A part of a block may be called alone: DiT's first block has the embedder of its end.
        for module in placed:
            self._visits[module] = []
            self._hooks.append(module.register_forward_pre_hook(self._enter))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def _placed(self) -> set[nn.Module]:
        """Every module of the blocks; stages replace some of them."""
        placed: set[nn.Module] = set()
        for name in self.blocks:
            placed.update(self.root.get_submodule(name).modules())
        return placed

    def __deepcopy__(self, memo: dict[int, object]) -> "Placement":
        """The placement of a copy of the model, such as one of shapes alone: none of its blocks."""
        return Placement(self.root, self.device)

    def _enter(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if module in self._visitors or module not in self._visits:
            return
        visit = ExitStack()
        visit.enter_context(self._visit(_inside((module,))))
        self._visits[module].append(visit)

    def _leave(self, module: nn.Module, args: tuple[object, ...], result: object) -> None:
        # A call whose visit found no room on the device, or was one already, has none to end.
        if visits := self._visits.get(module):
            visits.pop().close()

    @contextmanager
    def visit(self, *modules: nn.Module) -> Iterator[None]:
        """The modules' tensors are on the device within the context, and on the CPU afterwards.

        Modules that visit already, and those outside of the blocks, stay where they are.
        """
        inside = _inside(modules) & self._placed() if self.blocks else set()
        with self._visit(inside):
            yield

    @contextmanager
    def _visit(self, modules: set[nn.Module]) -> Iterator[None]:
        guests = modules - self._visitors
        self._visitors |= guests
        homes: _Homes = {}
        try:
            for module in guests:
                _move(module, self.device, homes)
            yield
        finally:
            for module in guests:
                _move(module, CPU, homes)
            self._visitors -= guests

    def end(self) -> None:
        """Move the whole model to the device, once it is small."""
        for hook in self._hooks:
            hook.remove()
        if self.blocks:
            self.blocks = ()
            self.root.to(self.device)
            empty_cache(self.device)


def _inside(modules: tuple[nn.Module, ...]) -> set[nn.Module]:
    inside: set[nn.Module] = set()
    for module in modules:
        inside.update(module.modules())
    return inside


@torch.no_grad()
def _move(module: nn.Module, device: torch.device, homes: _Homes) -> None:
    """Move the module's own tensors, without those of the modules in it.

    On the way to the device, `homes` collects the tensors of the CPU. On the way back they are used
    again where the device has not changed them.
    """
    for name, parameter in module.named_parameters(recurse=False):
        module._parameters[name] = _other(parameter, device, homes)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = _other(buffer, device, homes)
    if isinstance(module, QuantizedLayer):
        if module._codes is not None:
            module._codes = _other(module._codes, device, homes)
        if module._grid is not None:
            grid = module._grid
            factor = None if grid.factor is None else _other(grid.factor, device, homes)
            scale = _other(grid.scale, device, homes)
            module._grid = Grid(scale, _other(grid.zero, device, homes), factor)


def _other(tensor: Tensor, device: torch.device, homes: _Homes) -> Any:
    """The tensor of the other place: the one it came from, or a copy.

    A parameter becomes another parameter, because not every device can take over its data.
    """
    home = homes.get(id(tensor))
    if home is not None and device == CPU and home.is_that_of(tensor):
        return home.tensor
    if tensor.device == device:
        return tensor
    there = moved_to_cpu(tensor.detach()) if device == CPU else tensor.detach().to(device)
    if isinstance(tensor, nn.Parameter):
        there = nn.Parameter(there, requires_grad=tensor.requires_grad)
    homes[id(there)] = _Home(tensor, there, there.data_ptr(), there._version)
    return there
