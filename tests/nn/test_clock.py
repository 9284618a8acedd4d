"""The clock: its index, where it is looked up, and what an unknown timestep does."""

import pytest
import torch

from lowtide.nn.clock import Clock, SeenTimesteps, at_step


def test_a_schedule_is_copied_once_and_again_after_a_write():
    """On a device, each copy would wait for all that the device has to do."""
    schedule = torch.tensor([900, 500, 100])
    seen = SeenTimesteps.of(schedule)
    first, second, _ = schedule
    assert first._base is schedule
    assert seen.has(second._base)
    assert seen.part(second).tolist() == 500
    assert seen.part(schedule[1:].expand(2, 2)).tolist() == [[500, 100], [500, 100]]
    assert not seen.has(schedule.clone())
    schedule[1] = 400
    assert not seen.has(schedule)


@pytest.mark.parametrize(("value", "index"), [(900, 0), (500.2, 1), (100, 2)])
def test_the_device_finds_the_step_that_the_cpu_finds(value, index):
    clock = Clock((900, 500, 100), keyed=True)
    clock._set_on_device(torch.tensor(value, dtype=torch.float32), 0.5)
    assert clock.index.tolist() == index
    assert clock.doubt.tolist() == 0
    clock.set(value)
    assert clock.index.tolist() == index
    assert clock.doubt is None


def test_a_recorded_call_at_an_unknown_timestep_gets_nan_where_it_is_unknown():
    clock = Clock((900, 500, 100), keyed=True)
    clock._set_on_device(torch.tensor([900, 499, 100, 500]), 0.5)
    assert clock.index.tolist() == [0, 1, 2, 1]
    assert clock.doubt.isnan().tolist() == [False, True, False, False]


def test_several_entries_of_a_table():
    table = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(at_step(table, torch.tensor(2)), table[2])
    assert torch.equal(at_step(table, torch.tensor([2, 0])), table[[2, 0]])
    assert at_step(table[:, 0], torch.tensor(1)).shape == ()
