"""What lies on an accelerator while a model is quantized: its weights, and a stage's own bytes.

The calibration set, recorded calls and tapes are on the CPU. Text encoders and decoder are on the
card one at a time, while the denoiser is there too.
"""

from dataclasses import dataclass

from torch import nn

from lowtide.costs.work import Network

CODE = 1  # bytes of a weight's code before it is packed
# Bytes that a card's context and libraries take. It is stated by NVIDIA for none of its cards, and
# differs between drivers; half a GiB is what users report.
CONTEXT = 512 << 20
WHOLE = "whole"
BLOCKS = "blocks"


@dataclass(frozen=True)
class StageBytes:
    """The most bytes that a stage holds besides weights.

    whole: it works on the whole network at once, which is then on the card in any case.
    """

    bytes: float
    whole: bool = False


@dataclass(frozen=True)
class CardWeights:
    """Bytes of the denoiser's weights, with codes: all, outside of blocks, of the largest block."""

    all: int
    outside: int
    block: int

    @classmethod
    def of(cls, network: Network, width: int) -> "CardWeights":
        """The bytes with float weights of this width."""
        adapter = network.adapter
        blocks = [
            _parameters(adapter.meta.get_submodule(name)) for name in adapter.movable_blocks()
        ]
        total = _parameters(adapter.meta)
        each = width + CODE
        return cls(
            all=each * total,
            outside=each * (total - sum(blocks)),
            block=each * max(blocks, default=0),
        )

    def resident(self, place: str) -> int:
        """Bytes of weights on the card at one time."""
        return self.all if place == WHOLE else self.outside + self.block

    def peak(self, place: str, stage: StageBytes) -> float:
        """The most bytes on the card during a stage."""
        return self.resident(WHOLE if stage.whole else place) + stage.bytes


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
