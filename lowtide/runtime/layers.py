"""What the native kernels need of a packed layer, or why they cannot run it."""

from dataclasses import dataclass

from torch import Tensor

from lowtide.formats import Affine
from lowtide.kernels import native_library
from lowtide.kernels.panels import Panels
from lowtide.nn.packed import PackedConv2d, PackedLinear


@dataclass(frozen=True)
class NativeLayer:
    """A packed layer that the native kernels run: its weight, and its bias in float32."""

    panels: Panels
    bias: Tensor | None
    smooth: Tensor | None


def native_layer(layer: PackedLinear | PackedConv2d) -> NativeLayer | str:
    """The layer in the order of the native kernels, or the reason why they cannot run it."""
    library = native_library.native()
    reason = library.reason if library.library is None else unsupported(layer)
    if reason:
        return reason
    *_, smooth = layer.tables()
    bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
    divisors = smooth.detach().float().contiguous() if smooth.numel() else None
    return NativeLayer(layer.hold_panels(), bias, divisors)


def kernel_of(layer: PackedLinear | PackedConv2d) -> str:
    """The kernel that runs this layer on this machine, and the reason where it is plain torch."""
    library = native_library.native()
    if library.library is None:
        return f"plain torch: {library.reason}"
    reason = unsupported(layer)
    return f"plain torch: {reason}" if reason else f"native {library.instruction_sets()[0]}"


def unsupported(layer: PackedLinear | PackedConv2d) -> str:
    """Why the native kernels cannot run this layer; empty if they can."""
    if layer.weight.device.type != "cpu":
        return f"it is on {layer.weight.device}"
    if not isinstance(layer.input.format, Affine):
        return "its inputs are in float"
    if not layer.rows().fits:
        return "its weights do not fit in 8 bits"
    return _unsupported_shape(layer) if isinstance(layer, PackedConv2d) else ""


def _unsupported_shape(layer: PackedConv2d) -> str:
    if layer.groups != 1:
        return f"its channels are in {layer.groups} groups"
    if tuple(layer.dilation) != (1, 1):
        return f"its dilation is {tuple(layer.dilation)}"
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return f"its padding is {layer.padding} of {layer.padding_mode}"
    return ""
