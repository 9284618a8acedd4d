"""The zoo's models: what each one trains, for how many steps, and with which learning rates."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training import pixels
from training.dit import ClassConditionalDigitLatents
from training.emoji import Emoji, EmojiAutoencoder
from training.phases import TrainingPhase, single_phase
from training.task import Task


@dataclass(frozen=True)
class ZooModel:
    """One model's task and its training settings.

    task: builds the task from the data folder.
    average: the decay of the moving average of the weights.
    """

    task: Callable[[Path], Task]
    phases: tuple[TrainingPhase, ...]
    batch: int = 64
    average: float = 0.999
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.phases[-1].until


DIGITS = (
    TrainingPhase(8_000, 1e-3, (0, 8_000)),
    TrainingPhase(12_000, 1e-3, (0, 12_000)),
    TrainingPhase(18_000, 6e-4, (12_000, 18_000), snr_cap=5.0),
    TrainingPhase(19_500, 6e-4, (18_000, 26_000), snr_cap=5.0, typical=1 / 3),
    TrainingPhase(24_000, 6e-4, (19_500, 24_000), snr_cap=5.0, typical=1 / 3),
)
EMOJI = (
    TrainingPhase(6_251, 8e-4, (0, 7_000)),
    TrainingPhase(9_500, 8e-4, (6_251, 15_000), snr_cap=5.0),
    TrainingPhase(12_500, 6e-4, (9_500, 12_500), snr_cap=5.0),
)
# The label matters most where the image is still noise. The second and third phases train those
# timesteps; the last phase restores the detail.
CLASS_CONDITIONAL_DIGITS = (
    TrainingPhase(2_500, 6e-4, (0, 2_500), snr_cap=5.0, typical=1 / 3),
    TrainingPhase(3_000, 1e-3, (2_500, 6_000), snr_cap=0.01, typical=1 / 3),
    TrainingPhase(3_750, 1e-3, (3_000, 4_000), snr_cap=0.01, typical=1 / 3),
    TrainingPhase(4_000, 4e-4, (3_750, 4_000), snr_cap=5.0, typical=1 / 3),
)
DIT = (
    TrainingPhase(8_000, 8e-4, (0, 8_000)),
    TrainingPhase(8_750, 8e-4, (8_000, 14_000), snr_cap=5.0, typical=1 / 3),
    TrainingPhase(11_000, 8e-4, (8_750, 11_000), snr_cap=5.0, typical=1 / 3),
)
# Stopped at 7,789 of 9,000 steps, when the time on the GPU was over.
CIFAR10 = (TrainingPhase(7_789, 4e-4, (0, 9_000)),)


def _cifar10(data: Path) -> Task:
    return pixels.Cifar10(data, pixels.cifar10_model)


def _small_cifar10(data: Path) -> Task:
    return pixels.Cifar10(data, pixels.small_cifar10_model)


ZOO_MODELS = {
    "digits": ZooModel(pixels.Digits, DIGITS),
    "digits-cond": ZooModel(pixels.ClassConditionalDigits, CLASS_CONDITIONAL_DIGITS),
    "emoji-vae": ZooModel(EmojiAutoencoder, single_phase(800, 5e-4), batch=16, average=0.99),
    "emoji": ZooModel(Emoji, EMOJI, batch=32),
    "dit": ZooModel(ClassConditionalDigitLatents, DIT),
    "cifar10": ZooModel(_cifar10, CIFAR10, batch=256, average=0.9995),
    "cifar10-small": ZooModel(_small_cifar10, single_phase(16_000, 1e-3, snr_cap=5.0), batch=32),
}
