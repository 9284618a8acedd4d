"""What each zoo model is: its task, for how long it is trained, and how its learning rate falls."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lowtide.zoo import pixels
from lowtide.zoo.dit import LabelledDigitLatents
from lowtide.zoo.emoji import Emoji, EmojiAutoencoder
from lowtide.zoo.noise import Leg, one_leg


class Task(Protocol):
    """What is trained: the parts with weights, a loss drawn from a generator, and the pipeline they make.

    `data` says what it learns from, `shown` what the grid of samples holds, row by row of eight.
    """

    data: str
    shown: str
    parts: nn.ModuleDict

    def loss(self, parts: nn.ModuleDict, draw: torch.Generator, batch: int, leg: Leg) -> Tensor: ...

    def pipeline(self, parts: nn.ModuleDict) -> Any: ...

    def samples(self, pipe: Any) -> np.ndarray: ...


@dataclass(frozen=True)
class Spec:
    """A task, and for how long."""

    task: Callable[[Path], Task]
    legs: tuple[Leg, ...]
    batch: int = 64
    average: float = 0.999
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.legs[-1].until


DIGITS = (
    Leg(8_000, 1e-3, (0, 8_000)),
    Leg(12_000, 1e-3, (0, 12_000)),
    Leg(18_000, 6e-4, (12_000, 18_000), snr_cap=5.0),
    Leg(19_500, 6e-4, (18_000, 26_000), snr_cap=5.0, typical=1 / 3),
    Leg(24_000, 6e-4, (19_500, 24_000), snr_cap=5.0, typical=1 / 3),
)
EMOJI = (
    Leg(6_251, 8e-4, (0, 7_000)),
    Leg(9_500, 8e-4, (6_251, 15_000), snr_cap=5.0),
    Leg(12_500, 6e-4, (9_500, 12_500), snr_cap=5.0),
)
# A label speaks where the picture is still noise: the middle legs learn there, the last brings the detail back.
DIGITS_COND = (
    Leg(2_500, 6e-4, (0, 2_500), snr_cap=5.0, typical=1 / 3),
    Leg(3_000, 1e-3, (2_500, 6_000), snr_cap=0.01, typical=1 / 3),
    Leg(3_750, 1e-3, (3_000, 4_000), snr_cap=0.01, typical=1 / 3),
    Leg(4_000, 4e-4, (3_750, 4_000), snr_cap=5.0, typical=1 / 3),
)
DIT = (
    Leg(8_000, 8e-4, (0, 8_000)),
    Leg(8_750, 8e-4, (8_000, 14_000), snr_cap=5.0, typical=1 / 3),
    Leg(11_000, 8e-4, (8_750, 11_000), snr_cap=5.0, typical=1 / 3),
)
SPECS = {
    "digits": Spec(pixels.Digits, DIGITS),
    "digits-cond": Spec(pixels.LabelledDigits, DIGITS_COND),
    "emoji-vae": Spec(EmojiAutoencoder, one_leg(800, 5e-4), batch=16, average=0.99),
    "emoji": Spec(Emoji, EMOJI, batch=32),
    "dit": Spec(LabelledDigitLatents, DIT),
    "cifar10": Spec(lambda data: pixels.Cifar(data, pixels.cifar_model), one_leg(24_000, 4e-4), batch=256, average=0.9995),
    "cifar10-small": Spec(
        lambda data: pixels.Cifar(data, pixels.small_cifar_model), one_leg(16_000, 1e-3, snr_cap=5.0), batch=32
    ),
}
