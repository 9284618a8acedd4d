"""AdaRound: whether each weight goes up or down, learnt through a stretched sigmoid (Nagel et al., ICML 2020)."""

import torch
from torch import Tensor, nn

LOW, HIGH = -0.1, 1.1
SURE = 0.9  # where a decision made before starts: clear, and close enough to be revised


class AdaRound(nn.Module):
    """One number per weight; soft in [0, 1] while it learns, hard when it is done."""

    def __init__(self, position: Tensor, up: Tensor | None = None):
        """`position`: each weight in units of its step; soft() starts at its fraction, so nothing moves at first.

        With `up`, decisions made before, soft() starts near those instead: a warm start.
        """
        super().__init__()
        self.floor = position.floor()
        start = position - self.floor if up is None else SURE * up + (1 - SURE) * ~up
        inside = (start - LOW) / (HIGH - LOW)
        self.alpha = nn.Parameter(torch.log(inside / (1 - inside)))

    def soft(self) -> Tensor:
        return (torch.sigmoid(self.alpha) * (HIGH - LOW) + LOW).clamp(0, 1)

    def hard(self) -> Tensor:
        """True where the weight goes up. At the start this is rounding to nearest."""
        return self.alpha >= 0

    def penalty(self, sharpness: float) -> Tensor:
        """Sum of 1 - |2h - 1|^b: zero when every weight has made up its mind."""
        return (1 - (2 * self.soft() - 1).abs().pow(sharpness)).sum()
