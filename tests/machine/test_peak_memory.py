"""Peak memory: what a block allocates is counted, also after it is freed."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lowtide.machine import peak_memory
from lowtide.machine.peak_memory import Peak, reset_high_water

MIB = 1 << 20


def wait_until(seen: Callable[[], bool]) -> None:
    """Wait for the watcher, which a busy machine may hold up."""
    for _ in range(1000):
        if seen():
            return
        time.sleep(0.01)
    pytest.fail("the watcher saw nothing in ten seconds")


def test_peak_is_what_was_allocated_and_freed() -> None:
    with Peak() as peak:
        block = torch.ones(64 * MIB // 4)
        wait_until(lambda: peak.highest - peak.start > 60 * MIB)
        del block
    assert 60 * MIB < peak.above < 80 * MIB


def test_no_allocation_is_little() -> None:
    with Peak() as peak:
        time.sleep(0.05)
    assert 0 <= peak.above < 8 * MIB


@pytest.mark.skipif(
    not reset_high_water(),
    reason="only Linux has a mark that can be reset, and it does not always allow it",
)
def test_a_peak_too_short_for_the_watcher_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peak, "watch", lambda self: None)
    with Peak() as peak:
        torch.ones(64 * MIB // 4)
    assert 60 * MIB < peak.above < 80 * MIB


def test_the_watcher_works_without_the_kernels_mark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peak_memory, "RESET", tmp_path / "none" / "clear_refs")
    torch.ones(64 * MIB // 4)
    with Peak() as peak:
        time.sleep(0.05)
    assert 0 <= peak.above < 8 * MIB


def test_a_mapped_file_is_not_counted_when_it_is_gone_at_the_end(tmp_path: Path) -> None:
    tape = tmp_path / "tape"
    tape.write_bytes(bytes(64 * MIB))
    with Peak() as peak:
        before = peak.most_mapped
        mapped = np.memmap(tape, np.float32, "r")
        mapped.sum()
        wait_until(lambda: peak.most_mapped - before > 60 * MIB)
        del mapped
    assert 0 <= peak.above < 16 * MIB
