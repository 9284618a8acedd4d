"""Precision: which parts of a quantized model are rounded at the moment."""

from enum import Enum


class Precision(Enum):
    """A simulated layer runs in float, with rounded weights, with rounded inputs, or with both."""

    FLOAT = (False, False)
    WEIGHTS = (True, False)
    INPUTS = (False, True)
    FULL = (True, True)

    @property
    def weights(self) -> bool:
        """Whether weights are rounded."""
        return self.value[0]

    @property
    def inputs(self) -> bool:
        """Whether inputs are rounded."""
        return self.value[1]

    @classmethod
    def of(cls, *, weights: bool, inputs: bool) -> "Precision":
        """The precision with these parts rounded."""
        return cls((weights, inputs))
