"""Quantized attention: q, k, v and the softmax output pass through quantizers, whatever processor diffusers uses.

A processor of ours runs the original one and stands in for the single function they all end in,
`scaled_dot_product_attention`; no attention block's forward is written again. Nothing of diffusers is imported.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import Quantizer


class QuantAttention(nn.Module):
    """A diffusers attention processor around another one."""

    def __init__(self, inner: Any, quantizers: dict[str, Quantizer]):
        super().__init__()
        self.inner, self.active = inner, False
        # diffusers reads the signature of `processor.__call__` to decide which arguments to pass on: show it the inner one's.
        self.__dict__["__call__"] = inner.__call__
        self.q, self.k, self.v, self.softmax = (
            quantizers[name] for name in ("q", "k", "v", "softmax")
        )

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.active and not torch.is_autocast_enabled("cpu"):
            return self.inner(attn, *args, **kwargs)
        with StandIn(self.attend if self.active else in_float32):
            return self.inner(attn, *args, **kwargs)

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
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        """softmax(q k' * scale + mask) v, with all four tensors on their grids."""
        scale = named.get("scale") or 1 / math.sqrt(query.shape[-1])
        scores = self.q(query) @ self.k(key).transpose(-2, -1) * scale
        if named.get("is_causal") or (len(rest) > 1 and rest[1]):
            scores = scores + causal_mask(scores)
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, float("-inf")) if masked else scores + attn_mask
        return self.softmax(scores.float().softmax(-1).to(value.dtype)) @ self.v(value)


def in_float32(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **named: Any,
) -> Tensor:
    """Attention as torch has it, where products are taken in bf16 on a CPU: its kernel there is two to three times as slow."""
    mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), mask, *rest, **named
        )


def causal_mask(scores: Tensor) -> Tensor:
    return torch.full_like(scores[0, 0], float("-inf")).triu(1)


class StandIn(TorchFunctionMode):
    """Answer calls of scaled_dot_product_attention with another function."""

    def __init__(self, answer: Any):
        super().__init__()
        self.answer = answer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return (self.answer if func is F.scaled_dot_product_attention else func)(
            *args, **(kwargs or {})
        )
