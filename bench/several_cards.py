"""Hours to quantize SDXL by tfmq's roundings on 1, 8, 16 and 64 cards: reckoned, not measured.

    PYTHONPATH=.:bench python bench/several_cards.py

Counted here: the operations of a forward pass and the weights, from SDXL's configuration.
Taken from a measurement on one H200 (SD 1.5, bf16, CUDA graph): operations in a second.
Assumed: what a card's memory and its links carry. Everything else follows.
"""

import torch
from diffusers import UNet2DConditionModel
from gpu.networks import UNETS
from torch.utils.flop_counter import FlopCounterMode

from lowtide.models import adapt

# recipes/sdxl.toml, and what Settings say where it is silent.
STEPS = 50
IMAGES = 128
KEPT_STEPS = 20
ITERS = 20_000
BATCH = 16
TIAR_ITERS = 5 * ITERS
TIAR_ROWS = 512
CALIBRATION_BATCHES = IMAGES // 16
BRANCHES = 2  # guidance
# Measured: 1.6 TFLOP in 10.30 ms at batch 2, 12.8 in 52.13 ms at batch 16.
PER_SECOND = {2: 1.6e12 / 10.30e-3, 16: 12.8e12 / 52.13e-3}
# Assumed, in bytes a second.
MEMORY = 4.8e12
INSIDE = 360e9  # NVLink 4 and NVSwitch, 8 cards
OUTSIDE = 50e9  # 400 Gbit/s for each card
CARDS_INSIDE = 8
FLOAT = 4
UPDATE_BYTES = 170  # read and written for one weight by RoundingOptimizer
BACKWARD = 2  # times the work of a forward pass


def counted() -> tuple[float, int, int]:
    """Operations of a forward pass of one sample; weights outside and inside the temporal block."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**UNETS["sdxl"])
    adapter = adapt(model)
    temporal: set[str] = set()
    for unit in adapter.temporal():
        temporal |= set(unit.layers)
    sizes = {name: layer.weight.numel() for name, layer in adapter.layers().items()}
    inside = sum(size for name, size in sizes.items() if name in temporal)
    with FlopCounterMode(display=False) as flops, torch.device("meta"):
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        model(
            torch.zeros(1, 4, 128, 128),
            torch.zeros(1),
            torch.zeros(1, 77, 2048),
            added_cond_kwargs=added,
        )
    return flops.get_total_flops(), sum(sizes.values()) - inside, inside


def seconds(cards: int, forward: float, weights: int, temporal: int) -> dict[str, float]:
    """Seconds of each part on so many cards."""
    learning = min(cards, BATCH)  # cards that have a sample of each batch
    fast = PER_SECOND[16]
    drawn = IMAGES * BRANCHES * STEPS * forward / fast / min(cards, CALIBRATION_BATCHES)
    observed = IMAGES * BRANCHES * STEPS * forward / fast / cards
    streams = 2 * IMAGES * BRANCHES * KEPT_STEPS * forward / fast
    samples = BATCH / learning
    rate = fast if samples >= 16 else PER_SECOND[2]
    passes = ITERS * samples * (1 + BACKWARD) * forward / rate
    update = ITERS * weights * UPDATE_BYTES / MEMORY
    sent = 2 * (cards - 1) / cards * FLOAT * weights * ITERS
    link = INSIDE if cards <= CARDS_INSIDE else OUTSIDE
    tiar = TIAR_ITERS * temporal
    tiar *= TIAR_ROWS * 2 * (1 + BACKWARD) / fast + UPDATE_BYTES / MEMORY
    return {
        "calibration images": drawn,
        "ranges of inputs": observed,
        "streams, on every card": streams,
        "TIAR, on one card": tiar,
        "forward and backward of blocks": passes,
        "update of roundings, on every card": update,
        "gradients between cards": sent / link if cards > 1 else 0.0,
    }


def main() -> None:
    forward, weights, temporal = counted()
    print(f"forward pass of a sample: {forward / 1e12:.2f} TFLOP")
    print(f"weights: {weights / 1e9:.2f} G, and {temporal / 1e9:.3f} G in the temporal block")
    counts = (1, 8, 16, 64)
    columns = [seconds(cards, forward, weights, temporal) for cards in counts]
    print("\n| hours on | " + " | ".join(map(str, counts)) + " |")
    print("| --- |" + " ---: |" * len(counts))
    for part in columns[0]:
        print(f"| {part} | " + " | ".join(f"{each[part] / 3600:.2f}" for each in columns) + " |")
    totals = [sum(each.values()) / 3600 for each in columns]
    print("| **together** | " + " | ".join(f"**{total:.1f}**" for total in totals) + " |")
    sent = 2 * 7 / 8 * FLOAT * weights
    print(f"\nsent by each of 8 cards: {sent / 1e9:.1f} GB in an iteration of all blocks")


if __name__ == "__main__":
    main()
