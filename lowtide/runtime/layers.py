"""What the native kernels need of a packed layer, or why they cannot run it."""

from dataclasses import dataclass

from torch import Tensor

from lowtide.formats import Affine, Mixed
from lowtide.kernels import native_library, unpack_codes, zero_point
from lowtide.kernels.ops import Spec
from lowtide.kernels.panels import Panels, integer_weight, panels
from lowtide.nn.packed import PackedConv2d, PackedLinear


@dataclass(frozen=True)
class NativeLayer:
    """A packed layer that the native kernels run: its weight, and its bias in float32."""

    panels: Panels
    bias: Tensor | None
    smooth: Tensor | None


def native_layer(layer: PackedLinear | PackedConv2d) -> NativeLayer | str:
    """The layer in the order of the native kernels, or the reason why they cannot run it."""
    reason = unsupported(layer)
    if reason:
        return reason
    spec = Spec.of(layer.spec)
    scale, zero, factor, smooth = layer.tables()
    codes = unpack_codes(layer.weight, spec)
    taps = layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, PackedConv2d) else 1
    point = zero if zero.numel() else zero_point(spec.weight, scale, factor)
    factors = factor if factor.numel() else None
    whole = integer_weight(codes, scale, point, factors, spec.weight, taps)
    bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
    divisors = smooth.detach().float().contiguous() if smooth.numel() else None
    return NativeLayer(panels(whole), bias, divisors)


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
    bits = layer.format.bits if isinstance(layer.format, Mixed) else (layer.format.bits,)
    if max(bits) == 8 and isinstance(layer.format, Affine) and not layer.format.signed:
        return "its 8-bit weights have a free zero point"
    return _unsupported_shape(layer) if isinstance(layer, PackedConv2d) else ""


def _unsupported_shape(layer: PackedConv2d) -> str:
    if layer.groups != 1:
        return f"its channels are in {layer.groups} groups"
    if tuple(layer.dilation) != (1, 1):
        return f"its dilation is {tuple(layer.dilation)}"
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return f"its padding is {layer.padding} of {layer.padding_mode}"
    return ""
