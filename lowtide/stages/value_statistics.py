"""InputStatistics: what is known of a quantizer's inputs at each step, and kept of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

KEPT_VALUES = 2048
TAILS = 64


class Sample(NamedTuple):
    """A sample of a tensor's values.

    drawn: values drawn at random.
    tails: the least and the greatest value of each of TAILS parts of the tensor.
    size: the number of values of the tensor.

    The ends of a range are rare values, one in a million, and few drawn values are near them. From
    drawn values alone, a search would cut off the values that they do not show. An end that weighs
    as much as one of 2,048 drawn values weighs five hundred times too much, and is never cut.
    """

    drawn: Tensor
    tails: Tensor
    size: int

    def weights(self) -> Tensor:
        """The number of values that each kept one stands for.

        A tail stands for itself alone. The drawn values share all others equally.
        """
        share = (self.size - len(self.tails)) / len(self.drawn)
        return torch.cat([torch.full_like(self.drawn, share), torch.ones_like(self.tails)])


def sampled(values: Tensor, generator: torch.Generator) -> Sample:
    """A sample of values, (n,); few values are all kept.

    Every n-th value would be one and the same column wherever n is a multiple of a row's length.
    """
    if len(values) <= KEPT_VALUES:
        return Sample(drawn=values, tails=values[:0], size=len(values))
    places = torch.randint(len(values), (KEPT_VALUES,), generator=generator)
    parts = values[: len(values) // TAILS * TAILS].view(-1, TAILS)
    tails = torch.cat(parts.aminmax(dim=0))
    return Sample(drawn=values[places.to(values.device)], tails=tails, size=len(values))


@dataclass
class InputStatistics:
    """Statistics of one quantizer's inputs at each step.

    lo, hi: minimum and maximum, (steps,); infinite where the quantizer is not called.
    samples: samples of the values, for searches that weigh them.
    """

    lo: Tensor
    hi: Tensor
    samples: list[list[Sample]] = field(default_factory=list)

    @classmethod
    def empty(cls, steps: int, device: torch.device | None = None) -> "InputStatistics":
        """Empty statistics, on the device of the values that will be added."""
        return cls(
            lo=torch.full((steps,), float("inf"), device=device),
            hi=torch.full((steps,), float("-inf"), device=device),
            samples=[[] for _ in range(steps)],
        )

    def add(self, x: Tensor, step: int, generator: torch.Generator | None) -> None:
        """Add the values of a tensor; with a generator, keep a sample of them."""
        values = x.detach().float().flatten()
        lo, hi = values.aminmax()
        self.lo[step] = torch.minimum(self.lo[step], lo)
        self.hi[step] = torch.maximum(self.hi[step], hi)
        if generator is not None:
            self.samples[step].append(sampled(values, generator))

    def join(self, later: "InputStatistics") -> None:
        """Add the statistics of later calls."""
        self.lo = torch.minimum(self.lo, later.lo)
        self.hi = torch.maximum(self.hi, later.hi)
        for own, more in zip(self.samples, later.samples, strict=True):
            own += more

    def tensors(self) -> dict[str, Tensor]:
        """The statistics as tensors of a record: samples are one after the other, by step."""
        samples = list(chain.from_iterable(self.samples))
        tensors = {"lo": self.lo, "hi": self.hi}
        if not samples:
            return tensors
        shapes: list[tuple[int, int, int, int]] = []
        for step, drawn in enumerate(self.samples):
            shapes += [(step, len(each.drawn), len(each.tails), each.size) for each in drawn]
        return tensors | {
            "shapes": torch.tensor(shapes),
            "drawn": torch.cat([each.drawn for each in samples]),
            "tails": torch.cat([each.tails for each in samples]),
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "InputStatistics":
        """The statistics of a record."""
        found = cls.empty(len(tensors["lo"]))
        found.lo = tensors["lo"].to(device)
        found.hi = tensors["hi"].to(device)
        if "shapes" not in tensors:
            return found
        shapes: list[list[int]] = tensors["shapes"].tolist()
        drawn = tensors["drawn"].to(device).split([shape[1] for shape in shapes])
        tails = tensors["tails"].to(device).split([shape[2] for shape in shapes])
        for (step, _, _, size), values, ends in zip(shapes, drawn, tails, strict=True):
            found.samples[step].append(Sample(values, ends, size))
        return found

    @property
    def called(self) -> bool:
        """Whether the quantizer was called at any step."""
        return bool(torch.isfinite(self.hi).any())

    def drawn(self) -> list[Tensor]:
        """A fair sample of the values at each step."""
        return [torch.cat([sample.drawn for sample in step]) for step in self.samples]

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step, values with both ends among them, and how many each one stands for."""
        for lo, hi, step in zip(self.lo, self.hi, self.samples, strict=True):
            values = [lo[None], hi[None]]
            weights = [lo.new_zeros(2)]
            for sample in step:
                values += [sample.drawn, sample.tails]
                weights.append(sample.weights())
            yield torch.cat(values), torch.cat(weights)

    def filled(self) -> "InputStatistics":
        """A step without values gets those of the nearest step that has some.

        A stage that draws timesteps may leave some of the schedule's steps out.
        """
        known = torch.isfinite(self.hi).nonzero().flatten().tolist()
        nearest = [
            min(known, key=lambda other, step=step: abs(other - step))
            for step in range(len(self.hi))
        ]
        return InputStatistics(
            self.lo[nearest], self.hi[nearest], [self.samples[step] for step in nearest]
        )

    def whole(self) -> "InputStatistics":
        """All steps as one."""
        samples: list[Sample] = []
        for step in self.samples:
            samples += step
        return InputStatistics(self.lo.min()[None], self.hi.max()[None], [samples])
