"""Room: how large a part of a batch the device's memory holds; found out by running out of it.

Where memory runs out, the batch is taken in halves, and halves of halves. A mean over the batch is
then a sum over its parts, and gradients add up. So the numbers are the same up to the order of
sums. The part that fitted is remembered.
"""

import gc
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from lowtide.errors import BadInput
from lowtide.machine.devices import empty_cache

T = TypeVar("T")


def _nothing() -> None:
    """The default of `undo`: do nothing."""


def complain(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)


class Room:
    """The largest part of a batch that has fitted so far; `part` is None while no batch was cut.

    again: the batch that ran out of memory is tried once more, so no new one is drawn.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None] = complain):
        self.device = device
        self.say = say
        self.part: int | None = None
        self.again = False
        self._asked = 0

    def spans(self, count: int) -> list[slice]:
        """A batch of so many samples, in parts that fit."""
        self._asked = count
        size = min(count, self.part or count)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def each(self, count: int, act: Callable[[slice], T]) -> list[T]:
        """What `act` gives for each part of a batch of so many samples."""
        return self.attempt(lambda: [act(span) for span in self.spans(count)])

    def mean(self, count: int, loss: Callable[[slice], Tensor]) -> Tensor:
        """The mean loss of a batch, from the mean loss of each part.

        A whole batch gives a loss to call `backward` on. The parts of one that is cut have added
        their gradients already, one after the other, so their mean has none.
        """
        if not torch.is_grad_enabled():
            return self.attempt(lambda: self._sum(count, loss))
        spans = self.spans(count)
        return loss(spans[0]) if len(spans) == 1 else self._sum(count, loss)

    def _sum(self, count: int, loss: Callable[[slice], Tensor]) -> Tensor:
        total = torch.zeros((), device=self.device)
        for span in self.spans(count):
            part = loss(span) * ((span.stop - span.start) / count)
            if part.requires_grad:
                with torch.autocast(self.device.type, enabled=False):
                    part.backward()
                # The next part makes its own copies of the weights in half precision.
                torch.clear_autocast_cache()
            total += part.detach()
        return total

    def descend(
        self,
        loss: Callable[[], Tensor],
        undo: Callable[[], object],
        draws: Iterable[torch.Generator] = (),
    ) -> Tensor:
        """Add the gradients of a loss to those of its leaves; the loss.

        undo: drops the gradients of an attempt that ran out of memory.
        """

        def act() -> Tensor:
            distance = loss()
            if distance.requires_grad:
                distance.backward()
            return distance.detach()

        return self.attempt(act, undo, draws)

    def attempt(
        self,
        act: Callable[[], T],
        undo: Callable[[], object] = _nothing,
        draws: Iterable[torch.Generator] = (),
    ) -> T:
        """What `act` gives; where memory runs out, `undo`, and once more in smaller parts.

        draws: generators that draw the same numbers in each attempt.
        """
        states = [(generator, generator.get_state()) for generator in draws]
        self._asked = 0
        while True:
            try:
                result = act()
                self.again = False
                return result
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            # Here the failed attempt is over, and nothing refers to its tensors.
            undo()
            self._halve(reason)
            for generator, state in states:
                generator.set_state(state)
            self.again = True

    def _halve(self, reason: str) -> None:
        size = min(self._asked, self.part or self._asked)
        if size < 2:
            raise BadInput(
                f"found too little memory on {self.device} for a single sample ({reason})",
                "memory for one sample",
                "use --place blocks, --dtype bfloat16, a smaller --size or another --device",
            )
        if self.part is None:
            self.say(
                f"memory on {self.device} ran out with {size} samples at once; from here on "
                "batches are taken in parts, with the same result up to the order of sums"
            )
        self.part = -(-size // 2)
        gc.collect()
        empty_cache(self.device)
