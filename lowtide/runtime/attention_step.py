"""The step of a program that runs attention on rounded operands."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowtide.kernels import native_library
from lowtide.runtime.memory import Address, Buffer, View
from lowtide.runtime.steps import Rounding, Step, address_or_none


@dataclass(eq=False)
class AttentionStep(Step):
    """Attention on rounded operands; views are (batch, heads, tokens, width).

    Operands are float32 or codes. `rounding`: the output is codes of this grid.
    """

    query: View
    key: View
    value: View
    output: View
    roundings: dict[str, Rounding]
    adaptive: bool
    factor: float
    bias: View | None
    scratch: View
    rounding: Rounding | None = None

    def uses(self) -> Iterator[Buffer]:
        views = (self.query, self.key, self.value, self.output, self.bias, self.scratch)
        return (view.buffer for view in views if view is not None)

    def structure(self, address: Address) -> native_library.Attention:
        batch, heads, queries, width = self.query.shape
        softmax = self.roundings["softmax"]
        bias = self.bias
        rounding = self.rounding
        sample, head, token, _ = self.output.meta.stride()
        return native_library.Attention(
            q=self._operand("q", self.query, address),
            k=self._operand("k", self.key, address),
            v=self._operand("v", self.value, address),
            p_scale=softmax.scale,
            p_zero=softmax.zero,
            p_top=softmax.top,
            adaptive=int(self.adaptive),
            factor=self.factor,
            bias=address_or_none(bias, address),
            bias_sample=0 if bias is None else _axis_stride(bias, 0),
            bias_head=0 if bias is None else _axis_stride(bias, 1),
            batch=batch,
            heads=heads,
            queries=queries,
            keys=self.key.shape[2],
            width=width,
            y=address(self.output),
            y_sample=sample,
            y_head=head,
            y_token=token,
            y_scale=rounding.scale if rounding else None,
            y_zero=rounding.zero if rounding else None,
            y_top=rounding.top if rounding else 0,
            scratch=address(self.scratch) if self.scratch.buffer.nbytes else None,
        )

    def _operand(self, name: str, view: View, address: Address) -> native_library.Operand:
        rounding = self.roundings[name]
        sample, head, token, _ = view.meta.stride()
        return native_library.Operand(
            x=address(view),
            sample=sample,
            head=head,
            token=token,
            scale=rounding.scale,
            zero=rounding.zero,
            top=rounding.top,
            is_codes=int(view.meta.dtype == torch.uint8),
        )


def _axis_stride(view: View, axis: int) -> int:
    return 0 if view.meta.shape[axis] == 1 else view.meta.stride(axis)
