"""Placement: a denoiser whose blocks lie on the CPU, and visit the device one at a time.

Everything outside of the blocks stays on the device: embeddings, norms, the first and the last
layer. A block comes to the device when it is called, and leaves when it has answered. Whoever works
on its weights without calling it, or calls it many times, keeps it there with `visit`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowtide.formats import Grid
from lowtide.machine.devices import CPU, empty_cache, moved_to_cpu
from lowtide.nn.quantized import QuantizedLayer


class _Home(NamedTuple):
    """A tensor on the CPU, and what its copy on the device was when it was made."""

    tensor: Tensor
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
        for name in self.blocks:
            block = self.root.get_submodule(name)
            self._visits[block] = []
            self._hooks.append(block.register_forward_pre_hook(self._enter))
            self._hooks.append(block.register_forward_hook(self._leave, always_call=True))

    def _placed(self) -> set[nn.Module]:
        """Every module of the blocks; stages replace some of them."""
        placed: set[nn.Module] = set()
        for name in self.blocks:
            placed.update(self.root.get_submodule(name).modules())
        return placed

    def _enter(self, block: nn.Module, args: tuple[object, ...]) -> None:
        visit = ExitStack()
        visit.enter_context(self.visit(block))
        self._visits[block].append(visit)

    def _leave(self, block: nn.Module, args: tuple[object, ...], result: object) -> None:
        # A call whose visit found no room on the device has none to end.
        if self._visits[block]:
            self._visits[block].pop().close()

    @contextmanager
    def visit(self, *modules: nn.Module) -> Iterator[None]:
        """The modules' tensors are on the device within the context, and on the CPU afterwards.

        Modules that visit already, and those outside of the blocks, stay where they are.
        """
        guests = _inside(modules) & self._placed() - self._visitors if self.blocks else set()
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
    for parameter in module.parameters(recurse=False):
        home = parameter.data
        if back := _home_of(parameter, device, homes):
            parameter.data = back
        else:
            parameter.data = _sent(home, device)
            homes[id(parameter)] = _Home(
                home, parameter, parameter.data_ptr(), parameter._version
            )
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


def _other(tensor: Tensor, device: torch.device, homes: _Homes) -> Tensor:
    """The tensor of the other place: the one it came from, or a copy."""
    if back := _home_of(tensor, device, homes):
        return back
    there = _sent(tensor, device)
    homes[id(there)] = _Home(tensor, there, there.data_ptr(), there._version)
    return there


def _home_of(owner: Tensor, device: torch.device, homes: _Homes) -> Tensor | None:
    """The CPU's tensor that this one was copied from, if it holds the same values."""
    home = homes.get(id(owner))
    return home.tensor if home and device == CPU and home.is_that_of(owner) else None


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return moved_to_cpu(tensor) if device == CPU else tensor.to(device)
