"""The machine that a program is for: where its memory lies, and what its kernels read and store."""

from dataclasses import dataclass

import torch

from lowtide.runtime.half import HALVES


@dataclass(frozen=True)
class Target:
    """`floats`: the types of values that kernels read and store. `code`: the type of codes.

    `has_sums`: each pixel of codes has the sum of them beside it. `folds`: an attention reads and
    stores codes, and a product stores the codes of a gated unit.
    """

    device: torch.device
    floats: frozenset[torch.dtype]
    code: torch.dtype
    has_sums: bool
    folds: bool

    @property
    def widens(self) -> bool:
        """Whether a model in half precision is computed in float32."""
        return not self.floats & HALVES


CPU = Target(
    torch.device("cpu"), frozenset({torch.float32}), torch.uint8, has_sums=False, folds=True
)


def card(device: torch.device) -> Target:
    """A card with Triton kernels."""
    return Target(device, HALVES | {torch.float32}, torch.int8, has_sums=True, folds=False)
