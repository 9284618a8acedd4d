"""What a hook of a layer is given: the layer's input, which some models pass by keyword."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def on_input(layer: nn.Module, see: Callable[[nn.Module, Tensor], None]) -> RemovableHandle:
    """Call `see` with the layer and its input before each of its calls, until it is removed."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        see(module, args[0] if args else kwargs["input"])

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def on_answer(
    layer: nn.Module, see: Callable[[nn.Module, Tensor, Tensor], None]
) -> RemovableHandle:
    """Call `see` with the layer, its input and its answer after each of its calls."""

    def hook(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], answer: Tensor
    ) -> None:
        see(module, args[0] if args else kwargs["input"], answer)

    return layer.register_forward_hook(hook, with_kwargs=True)
