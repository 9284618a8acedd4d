"""Peak memory: what a block takes is seen, also when it is gone again."""

import time

import torch

from lowtide.memory import EVERY, Peak

MIB = 1 << 20


def test_peak_is_what_was_taken_and_given_back() -> None:
    with Peak() as peak:
        taken = torch.ones(64 * MIB // 4)
        time.sleep(5 * EVERY)
        del taken
    assert 60 * MIB < peak.above < 80 * MIB


def test_nothing_taken_is_little() -> None:
    with Peak() as peak:
        time.sleep(2 * EVERY)
    assert 0 <= peak.above < 8 * MIB
