"""The divisors of a layer's input channels, as the native kernels take them."""

from dataclasses import dataclass

from torch import Tensor

SMALLEST = 1e-30  # of the divisors that have inverses


@dataclass(frozen=True, eq=False)
class Divisors:
    """The divisors in float32, and their inverses, by which the kernels divide faster.

    The quotient is correctly rounded if the inverse is a normal number. Without inverses, the
    kernels divide.
    """

    values: Tensor
    inverses: Tensor | None

    @classmethod
    def of(cls, smooth: Tensor) -> "Divisors":
        values = smooth.detach().float().contiguous()
        is_normal = bool(((values > SMALLEST) & (values < 1 / SMALLEST)).all())
        return cls(values, 1 / values if is_normal else None)

    @property
    def addresses(self) -> tuple[int, int | None]:
        return self.values.data_ptr(), None if self.inverses is None else self.inverses.data_ptr()
