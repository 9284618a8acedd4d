"""Call: one recorded call of the denoiser. The calibration set is a list of them."""

from dataclasses import dataclass

from lowtide.models import Arguments


@dataclass(frozen=True)
class Call:
    """One recorded call of the denoiser: its arguments by name, a batch of samples at one timestep.

    kept: its inputs serve reconstruction.
    """

    timestep: int
    arguments: Arguments
    kept: bool
