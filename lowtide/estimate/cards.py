"""Cards that a plan can reckon for without having one, by their makers' data sheets."""

from dataclasses import dataclass

from lowtide.costs import Speed
from lowtide.costs.speed import Products

# Shares of the data sheet's peaks that eager PyTorch reaches. They are assumptions, not measured.
LINEAR_SHARE = 0.45
CONV_SHARE = 0.3
BANDWIDTH_SHARE = 0.7
CALL = 5e-6  # seconds of the launch of one call
STEP_BYTES = 80  # bytes that an update of one weight's rounding reads and writes
SEARCH_PASSES = 200  # passes over a weight in the search for its range
PASSES = 3  # passes of memory for one value written
# Bytes a second between the CPU's memory and a card, on PCIe 4.0 with pinned memory.
LINK = 20e9


@dataclass(frozen=True)
class DataSheet:
    """Bytes of memory, bytes a second, and FLOP a second in half precision and in float32.

    Half precision is without sparsity. float32 is without TF32, as lowtide computes.
    """

    name: str
    memory: int
    bandwidth: float
    half: float
    single: float

    def speed(self, width: int) -> Speed:
        """Seconds of each kind of work with values of this width, reckoned."""
        low = _products(self.half)
        value = PASSES * width / (BANDWIDTH_SHARE * self.bandwidth)
        return Speed(
            full=low if width < 4 else _products(self.single),
            low=low,
            value=value,
            value_back=2 * value,
            weight=STEP_BYTES / (BANDWIDTH_SHARE * self.bandwidth),
            search=SEARCH_PASSES * 4 / (BANDWIDTH_SHARE * self.bandwidth),
            call=CALL,
            call_back=2 * CALL,
        )


def _products(flops: float) -> Products:
    """A multiply-add is two FLOP; a backward pass has twice as many as the forward pass."""
    conv = 2 / (CONV_SHARE * flops)
    linear = 2 / (LINEAR_SHARE * flops)
    return Products(conv=conv, conv_back=2 * conv, linear=linear, linear_back=2 * linear)


GB = 10**9
CARDS = {
    "h200": DataSheet("NVIDIA H200", 141 * GB, 4.8e12, 989e12, 67e12),
    "h100": DataSheet("NVIDIA H100 SXM", 80 * GB, 3.35e12, 989e12, 67e12),
    "a100": DataSheet("NVIDIA A100 80 GB", 80 * GB, 2.04e12, 312e12, 19.5e12),
    "l4": DataSheet("NVIDIA L4", 24 * GB, 0.3e12, 121e12, 30.3e12),
    "rtx4090": DataSheet("NVIDIA GeForce RTX 4090", 24 * GB, 1.01e12, 165e12, 82.6e12),
    "rtx3090": DataSheet("NVIDIA GeForce RTX 3090", 24 * GB, 0.94e12, 71e12, 35.6e12),
    "t4": DataSheet("NVIDIA T4", 16 * GB, 0.32e12, 65e12, 8.1e12),
}
ASSUMED = "rtx4090"  # where no card is here and none is named
