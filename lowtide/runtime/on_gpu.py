"""A packed denoiser on a GPU: Triton kernels in the place of its layers and attentions.

The layers run one by one. Nothing here waits for the device: the scales of the running step are
read there, through the clock's index. For a CUDA graph, capture `root.forward` and call
`GpuLayers.take_step` before each replay.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.formats import Adaptive, Affine, OwnRange
from lowtide.kernels.triton import missing
from lowtide.nn.attention import QuantAttention
from lowtide.nn.clock import Clock, find_clock
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import packed_layers
from lowtide.runtime.layers import OWN_RANGE

MOST_K = 2**31 // (255 * 128)  # an int32 holds the sum of so many products
MOST_TAPS = 16
WIDEST_HEAD = 256

AnyPacked = PackedLinear | PackedConv2d


class RunningStep:
    """The index of the running step, at one place on the device for each number of samples."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.first = torch.zeros(1, dtype=torch.int64, device=clock.scale.device)
        self.now = self.first.clone()
        self.places = {1: self.now}

    def take(self) -> None:
        """Copy the clock's index.

        A graph that is being captured reads what was copied before, unless the clock looked the
        index up on the device, which the graph then does at each replay.
        """
        index = self.clock.index.reshape(-1)
        is_set = self.clock.doubt is None
        if is_set and self.now.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if len(index) not in self.places:
            self.places[len(index)] = torch.empty_like(index, device=self.first.device)
        self.now = self.places[len(index)]
        self.now.copy_(index, non_blocking=True)

    def of(self, quantizer: Quantizer) -> Tensor:
        """The step to read. In a compiled graph, it is the index that the clock looked up there."""
        if not quantizer.per_step:
            return self.first
        return self.clock.index.reshape(-1) if torch.compiler.is_compiling() else self.now


def unsupported(layer: AnyPacked) -> list[str]:
    """Why no Triton kernel runs this layer; empty if one does."""
    reasons = [missing(layer.weight.device)]
    form = layer.input.format
    if isinstance(form, OwnRange):
        reasons.append(OWN_RANGE)
    elif form is not None and not isinstance(form, Affine):
        reasons.append(f"its inputs have the format {form}")
    if not layer.rows().fits:
        reasons.append("its weights do not fit in 8 bits")
    if layer.channels * layer.taps > MOST_K:
        reasons.append(f"sums of {layer.channels * layer.taps} products do not fit in 32 bits")
    if isinstance(layer, PackedConv2d):
        reasons += _unsupported_shape(layer)
    return [reason for reason in reasons if reason]


def _unsupported_shape(layer: PackedConv2d) -> list[str]:
    reasons = {
        "its inputs are in float, and only linear layers have a kernel for that": (
            layer.input.format is None
        ),
        f"its channels are in {layer.groups} groups": layer.groups != 1,
        f"its padding is {layer.padding} of {layer.padding_mode}": (
            isinstance(layer.padding, str) or layer.padding_mode != "zeros"
        ),
        f"its window has {layer.taps} pixels, more than {MOST_TAPS}": layer.taps > MOST_TAPS,
    }
    return [reason for reason, holds in reasons.items() if holds]


def kernel_name(layer: AnyPacked) -> str:
    """The kernel that runs this layer on its device, or why it runs in plain torch."""
    reasons = unsupported(layer)
    if reasons:
        return f"plain torch: {', '.join(reasons)}"
    bits = "mixed bits" if isinstance(layer.format.bits, tuple) else f"{layer.format.bits} bits"
    inputs = "float inputs" if layer.input.format is None else "int8 products"
    return f"Triton, {bits}, {inputs}"


def failure_of(error: Exception) -> str:
    """Why a kernel gave no answer, in one line."""
    [first, *_] = str(error).splitlines() or [type(error).__name__]
    return f"its Triton kernel failed ({first})"


class GpuLayer:
    """The product of one packed layer. The layer calls it in place of its operator."""

    def __init__(self, layer: AnyPacked, step: RunningStep):
        # Only here, because triton is not installed everywhere.
        from lowtide.kernels.triton import operators

        weight = layer.hold_resident()
        self.operators = operators
        self.tensors = operators.flat_tensors(weight)
        self.numbers = operators.flat_numbers(weight)
        self.step = step
        self.input = layer.input
        self.layer = layer
        self.smooth = layer.tables()[3]
        self.shape: list[int] = []
        if isinstance(layer, PackedConv2d):
            pairs = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            self.shape = [int(size) for size in chain.from_iterable(pairs)]
        self.top = layer.input.format.top if isinstance(layer.input.format, Affine) else 0
        self.failed = False

    def __call__(self, x: Tensor) -> Tensor | None:
        """The layer's output; None where only the operator has an answer."""
        if self.failed:
            return None
        try:
            return self._product(x)
        except self.operators.FAILURES as error:
            self.failed = True
            self.layer.kernel = f"plain torch: {failure_of(error)}"
            warnings.warn(f"A layer runs in plain torch: {failure_of(error)}.", stacklevel=2)
            return None

    def _product(self, x: Tensor) -> Tensor | None:
        arguments = (self.tensors, self.numbers, self.grid(), self.top, self.layer.bias)
        if self.shape:
            return self.operators.triton_conv2d(x, *arguments, self.shape)
        # A product of float32 numbers would lose digits on tensor cores.
        if self.input.format is None and (x.dtype == torch.float32 or self.smooth.numel()):
            return None
        return self.operators.triton_linear(x, *arguments)

    def grid(self) -> list[Tensor]:
        """Scales and zero points of all steps, the running step, and the divisors of the input."""
        if self.input.format is None:
            return []
        clock = self.input.clock
        tables = (clock.scale[self.input.row], clock.zero[self.input.row])
        return [*tables, self.step.of(self.input), self.smooth]


class GpuAttention:
    """Attention of one block. Its processor calls it in place of the plain one."""

    def __init__(self, processor: QuantAttention, step: RunningStep):
        from lowtide.kernels.triton import operators

        self.operators = operators
        self.parts = [processor.q, processor.k, processor.v, processor.softmax]
        self.step = step
        formats = [part.format for part in self.parts]
        self.tops = [form.top for form in formats if isinstance(form, Affine | Adaptive)]
        self.tops.append(int(isinstance(formats[3], Adaptive)))
        self.failed = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 - the signature is torch's
        **named: Any,
    ) -> Tensor | None:
        scale = named.get("scale")
        is_covered = query.dim() == 4 and query.shape[-1] <= WIDEST_HEAD
        if named.get("enable_gqa") or dropout_p or is_causal or not is_covered or self.failed:
            return None
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            shown = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
            attn_mask = shown.masked_fill(~attn_mask, float("-inf"))
        clock = self.parts[0].clock
        scales = [clock.scale[part.row] for part in self.parts]
        zeros = [clock.zero[part.row] for part in self.parts]
        index = self.step.of(self.parts[0])
        factor = scale or 1 / math.sqrt(query.shape[-1])
        operands = [query, key, value]
        try:
            return self.operators.triton_attention(
                operands, scales, zeros, index, self.tops, attn_mask, factor
            )
        except self.operators.FAILURES as error:
            self.failed = True
            warnings.warn(f"An attention runs in plain torch: {failure_of(error)}.", stacklevel=2)
            return None


def unsupported_attention(processor: QuantAttention, device: torch.device) -> list[str]:
    """Why no Triton kernel runs this attention; empty if one does."""
    parts = processor.quantizers()
    reasons = [missing(device)]
    plain = [name for name in ("q", "k", "v") if not isinstance(parts[name].format, Affine)]
    if plain:
        reasons.append(f"its {', '.join(plain)} are not on an affine grid")
    if not isinstance(parts["softmax"].format, Affine | Adaptive):
        reasons.append("its softmax is neither affine nor adaptive")
    if len({part.per_step for part in parts.values()}) > 1:
        reasons.append("only some of its operands have a range for each step")
    return [reason for reason in reasons if reason]


class GpuLayers:
    """The kernels of one denoiser on a GPU. `reasons`: why the other layers run in plain torch."""

    def __init__(self, root: nn.Module):
        self.clock = find_clock(root)
        self.step = RunningStep(self.clock)
        self.tables = (self.clock.scale, self.clock.zero, self.clock.timesteps)
        self.reasons: dict[str, str] = {}
        self.layers: dict[AnyPacked, GpuLayer] = {}
        self.attentions: dict[QuantAttention, GpuAttention] = {}
        for name, layer in packed_layers(root):
            layer.kernel = kernel_name(layer)
            reasons = unsupported(layer)
            if reasons:
                self.reasons[name] = ", ".join(reasons)
            else:
                self.layers[layer] = GpuLayer(layer, self.step)
        for name, module in root.named_modules():
            processor = getattr(module, "processor", None)
            if isinstance(processor, QuantAttention):
                reasons = unsupported_attention(processor, self.clock.scale.device)
                if reasons:
                    self.reasons[f"{name}.processor"] = ", ".join(reasons)
                else:
                    self.attentions[processor] = GpuAttention(processor, self.step)
        self.weights = [(layer, layer.weight, layer.weight._version) for layer in self.layers]

    def is_stale(self) -> bool:
        """Whether a table or a weight has changed since the layers were prepared."""
        now = (self.clock.scale, self.clock.zero, self.clock.timesteps)
        if any(new is not old for new, old in zip(now, self.tables, strict=True)):
            return True
        stale = False
        for layer, weight, version in self.weights:
            if layer.weight is weight and weight._version != version:
                # It was written into, and the sums beside it are of before.
                layer.hold_codes()
            stale = stale or layer.weight is not weight
        return stale

    def failures(self) -> tuple[type[Exception], ...]:
        """What Triton raises when a kernel does not compile or does not fit on the card."""
        from lowtide.kernels.triton import operators

        return operators.FAILURES

    def take_step(self) -> None:
        """Let the kernels read the clock's running step from here on."""
        self.step.take()

    def attach(self) -> None:
        """The layers run on the kernels from here on; torch.compile sees one operator for each."""
        for owner, product in [*self.layers.items(), *self.attentions.items()]:
            owner.product = product

    def detach(self) -> None:
        for owner in [*self.layers, *self.attentions]:
            owner.product = None

    @contextmanager
    def attached(self, owners: list[AnyPacked | QuantAttention]) -> Iterator[None]:
        """Within the context, these layers and attentions run on their kernels."""
        products: dict[nn.Module, Any] = {**self.layers, **self.attentions}
        with _holding({owner: products.get(owner) for owner in owners}):
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the context, the layers run on the kernels, at the clock's step."""
        self.take_step()
        with _holding({**self.layers, **self.attentions}):
            yield

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within the context, all layers run in plain torch."""
        with _holding(dict.fromkeys([*self.layers, *self.attentions])):
            yield


@contextmanager
def _holding(products: dict[Any, Any]) -> Iterator[None]:
    """Within the context, each owner has this product."""
    before = {owner: owner.product for owner in products}
    for owner, product in products.items():
        owner.product = product
    try:
        yield
    finally:
        for owner, product in before.items():
            owner.product = product
