"""The draft of a program: its steps so far, and its values, in memory or waiting."""

from collections import Counter

from torch import Tensor

from lowtide.runtime.memory import Buffer, View, new_view
from lowtide.runtime.steps import Step, TorchStep


class Draft:
    """Steps are added at the end. A value has a number, that of the graph, and a view."""

    def __init__(self, readers: Counter[int]):
        # How many calls read each value.
        self.readers = readers
        self.steps: list[Step | TorchStep] = []
        self.views: dict[int, View] = {}
        self.numbers: dict[Buffer, list[int]] = {}
        self.waiting: dict[Buffer, Producer] = {}
        # The view of all of a value that waits, or has waited.
        self.wholes: dict[Buffer, View] = {}

    def name(self, number: int, view: View) -> None:
        """From here on, the value of this number is this view."""
        self.views[number] = view
        self.numbers.setdefault(view.buffer, []).append(number)

    def is_read_once(self, buffer: Buffer) -> bool:
        """Whether no view of the buffer has two readers."""
        return all(self.readers[number] <= 1 for number in self.numbers.get(buffer, []))

    def wait(self, meta: Tensor, producer: "Producer") -> View:
        """A new value of this shape that waits for its readers."""
        return self.wait_for(new_view(meta), producer)

    def wait_for(self, view: View, producer: "Producer") -> View:
        """A new value, whose view is known to its producer, that waits for its readers."""
        self.waiting[view.buffer] = producer
        self.wholes[view.buffer] = view
        return view

    def floats(self, view: View) -> View:
        """The view, whose values are in memory from here on."""
        producer = self.waiting.pop(view.buffer, None)
        if producer is not None:
            producer.settle(self, self.wholes[view.buffer])
        return view

    def settle_all(self) -> None:
        for buffer in list(self.waiting):
            self.floats(self.wholes[buffer])


class Producer:
    """A value that is not in memory yet."""

    def settle(self, draft: Draft, whole: View) -> None:
        """Add the steps that store the value in `whole`."""
        raise NotImplementedError
