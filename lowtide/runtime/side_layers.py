"""LoRAs in a program: which are beside the layers, and whether they are as they were.

A program holds the scales of a LoRA as numbers, so it is of one set of adapters and scales. Layers
of peft are known by their `base_layer`; peft itself is not imported.
"""

from typing import Any

from torch import nn

from lowtide.nn.packed import Packed


class SideLayers:
    """The layers of peft and the side branches of a denoiser when its programs were prepared."""

    def __init__(self, root: nn.Module):
        modules = list(root.modules())
        self.adapted: list[Any] = [each for each in modules if "base_layer" in each._modules]
        self.packed = [each for each in modules if isinstance(each, Packed)]
        self.branches = self._branches()
        self.state = self._state()

    def _branches(self) -> list[nn.Module | None]:
        return [layer.side for layer in self.packed]

    def _state(self) -> list[tuple[Any, ...]]:
        return [_state_of(layer) for layer in self.adapted]

    def is_changed(self) -> bool:
        """Whether an adapter was switched, scaled or fused since then."""
        return bool(self.adapted) and self._state() != self.state

    def differ(self, root: nn.Module) -> bool:
        """Whether an adapter was loaded or unloaded, or a branch came or went."""
        now = SideLayers(root)
        return now.adapted != self.adapted or now.branches != self.branches


def _state_of(layer: Any) -> tuple[Any, ...]:
    """What the forward pass of a layer of peft decides by."""
    scales = tuple(getattr(layer, "scaling", {}).items())
    return (
        layer.disable_adapters,
        tuple(layer.active_adapters),
        tuple(layer.merged_adapters),
        scales,
    )
