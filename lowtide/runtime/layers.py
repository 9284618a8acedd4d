"""What the native kernels need of a packed layer, or why they cannot run it."""

from dataclasses import dataclass

from torch import Tensor

from lowtide.formats import Affine, Mixed, OwnRange
from lowtide.kernels import native_library, unpack_codes
from lowtide.kernels.divisors import Divisors
from lowtide.kernels.integers import IntegerWeight, integer_weight
from lowtide.kernels.ops import Spec
from lowtide.kernels.panels import Panels
from lowtide.kernels.triton.resident import ResidentWeight
from lowtide.nn.packed import PackedConv2d, PackedLinear

OWN_RANGE = "its inputs have ranges of their own, and our kernels take one for all of them"


@dataclass(frozen=True)
class NativeLayer:
    """A packed layer that kernels of ours run: its weight, and its bias in float32."""

    weight: Panels | ResidentWeight
    bias: Tensor | None
    smooth: Divisors | None

    @property
    def room(self) -> int:
        """The channels of a pixel of its codes on a card; 0 on a CPU, which has whole dwords."""
        return self.weight.room if isinstance(self.weight, ResidentWeight) else 0


def native_layer(layer: PackedLinear | PackedConv2d) -> NativeLayer | str:
    """The layer in the order of the native kernels, or the reason why they cannot run it."""
    library = native_library.native()
    reason = library.reason if library.library is None else unsupported(layer)
    if reason:
        return reason
    return _with_weight(layer, layer.hold_panels())


def card_layer(layer: PackedLinear | PackedConv2d) -> NativeLayer:
    """The layer in the order of the Triton kernels, which can run it."""
    return _with_weight(layer, layer.hold_resident())


def _with_weight(
    layer: PackedLinear | PackedConv2d, weight: Panels | ResidentWeight
) -> NativeLayer:
    *_, smooth = layer.tables()
    bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
    divisors = Divisors.of(smooth) if smooth.numel() else None
    return NativeLayer(weight, bias, divisors)


def integers(layer: PackedLinear | PackedConv2d) -> IntegerWeight:
    """The weight of a layer as int8 times a scale of each channel."""
    codes = unpack_codes(layer.codes(), Spec.of(layer.spec))
    return integer_weight(codes, layer.rows(), layer.taps)


def native_name(layer: PackedLinear | PackedConv2d) -> str:
    """The native kernels of this machine and the bits that they keep in memory."""
    [best, *_] = native_library.native().instruction_sets()
    if isinstance(layer.format, Mixed):
        return f"native {best}, {min(layer.format.bits)} to {max(layer.format.bits)} bits"
    groups = f" in groups of {layer.format.group}" if layer.format.group else ""
    return f"native {best}, {layer.format.bits} bits{groups}"


def unsupported(layer: PackedLinear | PackedConv2d) -> str:
    """Why the native kernels cannot run this layer; empty if they can."""
    reason = _no_native_values(layer)
    if not reason and isinstance(layer, PackedConv2d):
        return _unsupported_shape(layer)
    return reason


def _no_native_values(layer: PackedLinear | PackedConv2d) -> str:
    """Why the kernels do not take the inputs and the weight of this layer; empty if they do."""
    *_, smooth = layer.tables()
    format = layer.input.format
    if format is None and smooth.numel():
        return "its inputs are in float and have divisors"
    if isinstance(format, OwnRange):
        return OWN_RANGE
    if format is not None and not isinstance(format, Affine):
        return f"its inputs are in the format {type(format).__name__}"
    return _unfit_weight(layer)


def no_integers(layer: PackedLinear | PackedConv2d) -> str:
    """Why this layer is no product of integers; empty if it is."""
    if not isinstance(layer.input.format, Affine | OwnRange):
        return "its inputs are in float"
    return _unfit_weight(layer)


def _unfit_weight(layer: PackedLinear | PackedConv2d) -> str:
    if layer.weight.device.type != "cpu":
        return f"it is on {layer.weight.device}"
    return "" if layer.rows().fits else "its weights do not fit in 8 bits"


def _unsupported_shape(layer: PackedConv2d) -> str:
    if layer.groups != 1:
        return f"its channels are in {layer.groups} groups"
    if tuple(layer.dilation) != (1, 1):
        return f"its dilation is {tuple(layer.dilation)}"
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return f"its padding is {layer.padding} of {layer.padding_mode}"
    return ""
