"""Denoisers that count their calls, and stop the process at one of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from lowtide import sampling


class Stopped(BaseException):
    """A kill, as far as a process can survive one."""


@dataclass
class Calls:
    """The samples of each call of every denoiser that is loaded; the call `stop` ends it all."""

    stop: int | None = None
    end: Callable[[], None] | None = None
    counted: list[int] = field(default_factory=list)

    def count(self, module: object, args: tuple, kwargs: dict) -> None:
        if len(self.counted) == self.stop:
            if self.end is not None:
                self.end()
            raise Stopped
        self.counted.append(len((args or (kwargs["sample"],))[0]))


def counted_calls(patch: pytest.MonkeyPatch, stop: int | None = None, end=None) -> Calls:
    """Count the calls of every pipeline that is loaded from here on."""
    calls = Calls(stop, end)
    load = sampling.load_pipeline

    def loaded(*args, **options):
        pipe = load(*args, **options)
        sampling.denoiser(pipe).register_forward_pre_hook(calls.count, with_kwargs=True)
        return pipe

    patch.setattr(sampling, "load_pipeline", loaded)
    patch.setattr("lowtide.sampling.loading.load_pipeline", loaded)
    return calls
