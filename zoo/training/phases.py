"""A training phase: its last step, its learning rate, and how it weights the timesteps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingPhase:
    """One phase of a training run.

    until: the step at which the phase ends.
    rate: the peak learning rate.
    cosine: the first and the last step of the cosine that the learning rate follows. The phase may
        use only a part of it.
    snr_cap: weights a timestep's loss by min(snr, cap) / snr (Hang et al., 2023). Fine detail makes
        up most of the unweighted loss; with the cap it no longer hides errors in the overall shape.
        None weights all timesteps equally.
    typical: below 1, a task that can rank its images learns only from this share of them, the most
        typical of each class. A small model then draws fewer kinds of images, each better.
    """

    until: int
    rate: float
    cosine: tuple[int, int]
    snr_cap: float | None = None
    typical: float = 1.0

    def describe(self) -> str:
        start, end = self.cosine
        text = f"to step {self.until:,}: rate {self.rate:g} on a cosine from {start:,} to {end:,}"
        if self.snr_cap is not None:
            text += f", timesteps weighted by min(snr, {self.snr_cap:g}) / snr"
        if self.typical != 1:
            text += f", on the {self.typical:.0%} most typical images of each class"
        return text


def single_phase(
    steps: int,
    rate: float,
    snr_cap: float | None = None,
) -> tuple[TrainingPhase, ...]:
    """A run of one phase whose cosine covers all of its steps."""
    return (TrainingPhase(steps, rate, (0, steps), snr_cap),)
