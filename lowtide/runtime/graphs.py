"""CUDA graphs: a program recorded once, then replayed with one call of the driver.

A program has its inputs, its running step and its memory at fixed places, so a call fills the
places, replays, and copies the answer. The clock looks the timestep up before that, so an unknown
one is an error as without a graph.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from lowtide.errors import BadInput

WARM_UP = 2  # runs before the recording: kernels are compiled, and scratch memory is made


class Recording(Protocol):
    """Launches that were recorded."""

    def replay(self) -> None: ...


Record = Callable[[Callable[[], None]], Recording]


def record_graph(run: Callable[[], None]) -> Recording:
    """Record what this function launches on the current card."""
    if not torch.cuda.is_available():
        raise BadInput("found no CUDA card", "a card that records graphs", "run without capture")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream is being recorded, so that no graph can be replayed on it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
