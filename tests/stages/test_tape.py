"""A tape holds what its store has room for; the rest is on disk, and reads the same."""

import pytest
import torch

from lowtide.stages.tape import Store, Tape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_batches_beyond_the_budget_are_on_disk_and_all_read_alike(dtype):
    size = 6 * dtype.itemsize
    store = Store(2 * size)  # room for exactly two
    tape = Tape(store)
    batches = [(10 * number + torch.arange(6).reshape(3, 2)).to(dtype).T for number in range(4)]
    for batch in batches:
        tape.append(batch)
    assert (store.held, store.count, len(tape)) == (2 * size, 2, 4)
    for place, batch in enumerate(batches):
        assert tape[place].dtype == dtype and torch.equal(tape[place], batch)
    assert list(tape_folder(store)) == []  # a file is gone as soon as it is mapped


def tape_folder(store: Store):
    return store.next_file().parent.iterdir()


def test_room_is_given_back_with_the_batch():
    store = Store(8)
    for number in range(3):
        tape = Tape(store)
        tape.append(torch.full((2,), float(number)))
        del tape
    assert (store.held, store.count) == (0, 0)


def test_an_empty_batch_needs_no_file():
    store = Store(0)
    tape = Tape(store)
    tape.append(torch.zeros(0, 4))
    tape.append(torch.zeros(1))
    assert store.count == 1 and tape[0].shape == (0, 4)


def test_a_batch_is_no_part_of_a_graph():
    tape = Tape(Store(100))
    tape.append(torch.ones(2, requires_grad=True) * 2)
    assert not tape[0].requires_grad
