"""Room: batches that do not fit are taken in parts, with the same mean, gradients and draws."""

import pytest
import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.machine.room import Room
from lowtide.nn.quantizer import QDrop, SamplePart

CPU = torch.device("cpu")


class Narrow(nn.Linear):
    """A layer that runs out of memory above so many samples."""

    def __init__(self, most: int):
        super().__init__(8, 8)
        self.most = most
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"out of memory at {len(x)} samples")
        return super().forward(x)


def narrow(most: int) -> Narrow:
    torch.manual_seed(0)
    return Narrow(most)


def descended(layer: Narrow, room: Room, x: Tensor) -> tuple[Tensor, Tensor]:
    layer.zero_grad()

    def loss() -> Tensor:
        return room.mean(len(x), lambda span: layer(x[span]).square().sum(1).mean())

    return room.descend(loss, layer.zero_grad), layer.weight.grad.clone()


@pytest.mark.parametrize("most", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [7, 8])
def test_parts_have_the_mean_and_the_gradient_of_the_whole(most: int, size: int) -> None:
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(1))
    lines: list[str] = []
    room = Room(CPU, lines.append)
    loss, gradient = descended(narrow(most), room, x)
    whole, expected = descended(narrow(size), Room(CPU), x)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-6
    assert len(lines) == 1 and f"{size} samples at once" in lines[0]
    assert room.part <= most


def test_a_batch_that_fits_is_not_cut() -> None:
    layer = narrow(8)
    descended(layer, Room(CPU), torch.randn(8, 8))
    assert layer.sizes == [8]


def test_the_part_that_fitted_is_remembered() -> None:
    layer = narrow(2)
    room = Room(CPU, lambda line: None)
    descended(layer, room, torch.randn(8, 8))
    assert layer.sizes == [8, 4, 2, 2, 2, 2]
    descended(layer, room, torch.randn(4, 8))
    assert layer.sizes[6:] == [2, 2]


def test_memory_that_runs_out_in_the_backward_pass_leaves_no_gradient_twice() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    layer = narrow(8)
    failures = [True]

    def fail(gradient: Tensor) -> None:
        if failures and layer.weight.grad is not None:
            failures.pop()
            raise torch.OutOfMemoryError("out of memory in the backward pass")

    other = narrow(8)

    def loss(span: slice) -> Tensor:
        hidden = other(x[span])
        hidden.register_hook(fail)
        return layer(hidden).square().sum(1).mean()

    both = nn.ModuleList([layer, other])
    room = Room(CPU, lambda line: None)
    room.descend(lambda: room.mean(len(x), loss), both.zero_grad)
    assert not failures and room.part == 2
    again = layer.weight.grad.clone()
    both.zero_grad()
    loss(slice(0, 4)).backward()
    assert ((again - layer.weight.grad).norm() / again.norm()).item() < 1e-6


def test_one_sample_that_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(BadInput, match="too little memory on cpu for a single sample"):
        descended(narrow(0), Room(CPU, lambda line: None), torch.randn(8, 8))


def test_an_error_outside_of_a_batch_is_that_sentence_too() -> None:
    def act() -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(BadInput, match="--place blocks"):
        Room(CPU, lambda line: None).attempt(act)


def test_a_generator_draws_the_same_in_each_attempt() -> None:
    generator = torch.Generator().manual_seed(3)
    drawn: list[float] = []

    def act() -> None:
        drawn.append(torch.rand((), generator=generator).item())
        room.spans(4)
        if len(drawn) < 2:
            raise torch.OutOfMemoryError("out of memory")

    room = Room(CPU, lambda line: None)
    room.attempt(act, draws=[generator])
    assert drawn[0] == drawn[1]


def test_inputs_are_dropped_alike_in_the_whole_batch_and_in_its_parts() -> None:
    drop = QDrop(0.5, torch.Generator().manual_seed(4))
    state = drop.generator.get_state()
    x = torch.zeros(6, 3, 5)
    drop.rewind(state, SamplePart(0, 6, 6))
    whole = [drop(x, x + 1), drop(x[:, 0], x[:, 0] + 1)]
    after = drop.generator.get_state()
    parts: list[list[Tensor]] = []
    for span in (slice(0, 4), slice(4, 6)):
        drop.rewind(state, SamplePart(span.start, span.stop, 6))
        parts.append([drop(x[span], x[span] + 1), drop(x[span, 0], x[span, 0] + 1)])
        assert torch.equal(drop.generator.get_state(), after)
    for number, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[number] for part in parts]), expected)
