"""Upcoming: random batches of a unit's data, each gathered while the one before is learnt from."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from lowtide.machine.devices import CPU
from lowtide.machine.room import Room

T = TypeVar("T")


@dataclass
class Upcoming(Generic[T]):
    """Draws samples, and gathers their values on the CPU.

    draw: the samples of the next batch. gather: their values.

    Beside an accelerator a thread gathers the next batch while the device works. Samples are drawn
    one batch ahead then, in the same order, so the batches are the same. On a CPU the thread would
    only take time from the work.
    """

    room: Room
    draw: Callable[[torch.Generator], Sequence[int]]
    gather: Callable[[Sequence[int]], T]
    _last: T | None = None
    _source: torch.Generator | None = None
    _next: Future[T] | None = None
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="lowtide-gather")
    )

    def take(self, generator: torch.Generator) -> T:
        """The next batch of this generator, or once more the one that ran out of memory."""
        if self.room.again and self._last is not None:
            self.room.again = False
            return self._last
        if self._next is not None and self._source is generator:
            batch = self._next.result()
        else:
            batch = self.gather(self.draw(generator))
        self._last = batch
        self._next = None
        if self.room.device != CPU:
            self._source = generator
            self._next = self._thread.submit(self.gather, self.draw(generator))
        return batch
