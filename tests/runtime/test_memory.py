"""The arena: buffers that meet never overlap, and a view is at its place in memory."""

import random

import pytest
import torch

from lowtide.runtime.layouts import pixel_shape
from lowtide.runtime.memory import ALIGNMENT, Arena, Buffer, View, is_whole, new_view, whole_buffer


def meets(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


@pytest.mark.parametrize("seed", range(30))
def test_buffers_that_meet_do_not_overlap(seed):
    draw = random.Random(seed)
    lives: dict[Buffer, tuple[int, int]] = {}
    for _ in range(60):
        first = draw.randrange(20)
        size = draw.choice([0, 1, 3, 4, 63, 64, 65, 200, draw.randrange(1, 5000)])
        lives[Buffer(size)] = (first, first + draw.randrange(6))
    arena = Arena()
    arena.place(lives)
    buffers = list(lives)
    for index, one in enumerate(buffers):
        assert one.offset % ALIGNMENT == 0
        assert one.offset + one.nbytes <= arena.nbytes
        for other in buffers[:index]:
            if meets(lives[one], lives[other]) and one.nbytes and other.nbytes:
                apart = one.offset + one.nbytes <= other.offset
                assert apart or other.offset + other.nbytes <= one.offset


def test_buffers_that_do_not_meet_share_memory():
    lives = {Buffer(1000): (0, 1), Buffer(1000): (2, 3), Buffer(64): (1, 2)}
    arena = Arena()
    arena.place(lives)
    assert arena.nbytes == 1024 + 64


def test_values_written_to_the_arena_stay_apart():
    views = [new_view(torch.empty(size, device="meta")) for size in (5, 70, 3, 41)]
    arena = Arena()
    arena.place({view.buffer: (0, 9) for view in views})
    for number, view in enumerate(views):
        arena.tensor(view).fill_(number)
    assert [arena.tensor(view).unique().tolist() for view in views] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("fixed", [True, False])
def test_the_address_of_a_view_is_that_of_its_tensor(fixed):
    whole = new_view(pixel_shape(2, 4, 5, 6), fixed=torch.device("cpu") if fixed else None)
    first = new_view(torch.empty(7, device="meta"))
    arena = Arena()
    lives = {first.buffer: (0, 1)} | ({} if fixed else {whole.buffer: (0, 1)})
    arena.place(lives)
    part = View(whole.buffer, whole.meta[:, 2:, 1:].transpose(1, 2))
    assert arena.address(part) == arena.tensor(part).data_ptr()
    arena.tensor(whole).copy_(torch.arange(240).reshape(2, 6, 4, 5))
    expected = torch.arange(240.0).reshape(2, 6, 4, 5)[:, 2:, 1:].transpose(1, 2)
    assert torch.equal(arena.tensor(part), expected)


def test_a_new_view_has_the_bytes_of_its_extent():
    assert new_view(torch.empty(3, 5, dtype=torch.int64, device="meta")).buffer.nbytes == 120
    assert new_view(torch.empty(0, 5, device="meta")).buffer.nbytes == 0
    gaps = torch.empty_strided((2, 3), (10, 2), device="meta")
    assert new_view(gaps).buffer.nbytes == 4 * (10 + 4 + 1)
    assert new_view(pixel_shape(2, 3, 4, 5)).buffer.nbytes == 4 * 120


def test_whole_views_cover_their_buffer():
    view = new_view(pixel_shape(2, 3, 4, 5))
    assert is_whole(view)
    for change in (
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, None],
    ):
        assert is_whole(View(view.buffer, change(view.meta)))
    for change in (
        lambda x: x[:1],
        lambda x: x[:, 1:],
        lambda x: x[:, :, ::2],
        lambda x: x[:1].expand(2, 5, 3, 4),
    ):
        assert not is_whole(View(view.buffer, change(view.meta)))
    assert whole_buffer(view).shape == (120,)
