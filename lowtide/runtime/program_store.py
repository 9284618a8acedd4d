"""The programs of a denoiser: one for each shape and setting of its inputs, the latest few."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lowtide.runtime.guard import is_setting
from lowtide.runtime.program import Program
from lowtide.runtime.writes import Unfollowed

MOST = 4  # programs that are kept


def flat_settings(inputs: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Numbers, words and switches by name; one in a nested dict gets a dotted name."""
    found: list[tuple[str, Any]] = []
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            found += flat_settings(value, f"{prefix}{name}.")
        elif is_setting(value):
            found.append((f"{prefix}{name}", value))
    return found


class ProgramStore:
    """Makes a program at the first call with its shapes; the oldest makes room for a new one.

    A program that cannot be made is not tried again: `unfollowed` keeps the reason.
    """

    def __init__(self, make: Callable[[Mapping[str, Any]], Program]):
        self.make = make
        self.programs: dict[tuple, Program] = {}
        self.unfollowed: dict[tuple, str] = {}

    def program(self, inputs: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Program:
        """The program for these inputs, whose tensors are `tensors`."""
        shapes = [(name, tuple(each.shape), each.dtype) for name, each in tensors.items()]
        key = (*shapes, *sorted(flat_settings(inputs)))
        if key in self.unfollowed:
            raise Unfollowed(self.unfollowed[key])
        if key not in self.programs:
            while len(self.programs) >= MOST:
                del self.programs[next(iter(self.programs))]
            try:
                self.programs[key] = self.make(inputs)
            except Unfollowed as reason:
                self.unfollowed[key] = str(reason)
                raise
        return self.programs[key]
