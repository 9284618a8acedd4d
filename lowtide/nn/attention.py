"""Quantized attention: q, k, v and the softmax output are rounded, with any processor of diffusers.

Our processor runs the original one and replaces the one function that all processors end in,
`scaled_dot_product_attention`. So no forward pass of an attention block is written again. Nothing
of diffusers is imported.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowtide.errors import BadInput
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import Quantizer

# Functions that diffusers' processors end in.
FUNCTIONS = ("scaled_dot_product_attention", "dispatch_attention_fn")


class AttentionBlock(Protocol):
    """What is used of an attention block of diffusers."""

    processor: Callable[..., object]

    def set_processor(self, processor: Callable[..., object]) -> None: ...


def attention_block(root: nn.Module, name: str) -> AttentionBlock:
    """The attention block of that name; a plan of attentions names no other modules."""
    return cast(AttentionBlock, root.get_submodule(name))


@dataclass(frozen=True, eq=False)
class KeepRounding:
    """Takes the place of `block.set_processor`: another processor is rounded like the one before.

    Attention slicing, `set_attn_processor` and adapters of diffusers set processors.
    """

    block: nn.Module

    def __call__(self, processor: Callable[..., object]) -> None:
        block = cast(AttentionBlock, self.block)
        before = block.processor
        if isinstance(before, QuantAttention) and not isinstance(processor, QuantAttention):
            processor = before.around(processor)
        type(self.block).set_processor(self.block, processor)  # pyright: ignore


@dataclass(frozen=True, eq=False)
class PlainProcessor:
    """Takes the place of `block.get_processor`: diffusers sees the processor inside.

    IP-Adapters look for processors of their classes, to scale and to remove them.
    """

    block: nn.Module

    def __call__(self, return_deprecated_lora: bool = False) -> object:  # noqa: FBT001, FBT002
        processor = cast(AttentionBlock, self.block).processor
        return processor.inner if isinstance(processor, QuantAttention) else processor


def check_rounded(processor: Callable[..., object]) -> None:
    """Refuse a processor whose attention is not torch's one function, which we replace."""
    try:
        source = inspect.getsource(type(processor).__call__)
    except (OSError, TypeError):
        return  # a processor without a source is taken at its word
    if not any(name in source for name in FUNCTIONS):
        raise BadInput(
            f"found {type(processor).__name__}, which multiplies q, k and v by itself",
            "a processor that calls scaled_dot_product_attention, so that they are rounded",
            "leave attention slicing off, or quantize with --keep-float NAME for these attentions",
        )


def set_rounded(block: AttentionBlock, quantizers: "dict[str, Quantizer]") -> None:
    """Round the attention of a block, with every processor that it gets."""
    block.set_processor(QuantAttention(block.processor, quantizers))
    module = cast(nn.Module, block)
    module.__dict__["set_processor"] = KeepRounding(module)
    module.__dict__["get_processor"] = PlainProcessor(module)


def set_unrounded(block: AttentionBlock) -> None:
    """Give a block its own processor back."""
    for name in ("set_processor", "get_processor"):
        cast(nn.Module, block).__dict__.pop(name, None)
    if isinstance(block.processor, QuantAttention):
        block.set_processor(block.processor.inner)


class QuantAttention(nn.Module):
    """A diffusers attention processor that runs another one, `inner`.

    `product`: a faster attention, which the runtime sets. It gives None where `attend` has to run.
    """

    product: Callable[..., Tensor | None] | None = None

    def __init__(self, inner: Callable[..., object], quantizers: dict[str, Quantizer]):
        super().__init__()
        self.inner = inner
        self.active = False
        # diffusers reads the signature of `processor.__call__` to choose the arguments it passes.
        # It has to see the signature of the inner processor.
        self.__dict__["__call__"] = inner.__call__
        self.q = quantizers["q"]
        self.k = quantizers["k"]
        self.v = quantizers["v"]
        self.softmax = quantizers["softmax"]
        # The attention as it was quantized; a plain attribute keeps it out of the modules.
        self.__dict__["first"] = self

    def __call__(self, attn: nn.Module, *args: object, **kwargs: object) -> object:
        if not self.active and not torch.is_autocast_enabled("cpu"):
            return self.inner(attn, *args, **kwargs)
        with _ReplacedAttention(self.attend if self.active else _attend_in_float32):
            return self.inner(attn, *args, **kwargs)

    def around(self, processor: Callable[..., object]) -> "QuantAttention":
        """The same rounding around another processor; the first one comes back as it was."""
        first: QuantAttention = self.__dict__["first"]
        if processor is self.inner:
            return self
        if processor is not first.inner:
            check_rounded(processor)
            other = QuantAttention(processor, self.quantizers())
            other.__dict__["first"] = first
            other.active = self.active
            return other
        first.active = self.active
        return first

    def quantizers(self) -> dict[str, Quantizer]:
        return {"q": self.q, "k": self.k, "v": self.v, "softmax": self.softmax}

    def set_precision(self, precision: Precision) -> None:
        self.active = precision.inputs
        for quantizer in self.quantizers().values():
            quantizer.enabled = precision.inputs

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *rest: float,
        **named: float | None,
    ) -> Tensor:
        """softmax(q k' * scale + mask) v, with q, k, v and the softmax output on their grids.

        Shapes are (batch, heads, tokens, width). `rest` is (dropout, is_causal), as in torch.
        """
        if self.product is not None:
            output = self.product(query, key, value, attn_mask, *rest, **named)
            if output is not None:
                return output
        scale = named.get("scale") or 1 / math.sqrt(query.shape[-1])
        scores = self.q(query) @ self.k(key).transpose(-2, -1) * scale
        if named.get("is_causal") or (len(rest) > 1 and rest[1]):
            scores = scores + _causal_mask(scores)
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = (
                scores.masked_fill(~attn_mask, float("-inf")) if boolean else scores + attn_mask
            )
        return self.softmax(scores.float().softmax(-1).to(value.dtype)) @ self.v(value)


def _attend_in_float32(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **named: Any,
) -> Tensor:
    """torch's attention in float32, for a CPU that computes products in bf16.

    There, torch's own kernel for bf16 takes two to three times as long.
    """
    mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), mask, *rest, **named
        )


def _causal_mask(scores: Tensor) -> Tensor:
    return torch.full_like(scores[0, 0], float("-inf")).triu(1)


class _ReplacedAttention(TorchFunctionMode):
    """Calls of scaled_dot_product_attention run `attend` instead."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        function = self.attend if func is F.scaled_dot_product_attention else func
        return function(*args, **(kwargs or {}))
