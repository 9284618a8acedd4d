"""Denoisers that no Architecture describes: recorded from an example call, or refused."""

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.models import adapt


class Block(nn.Module):
    """Adds a projection of the time to the picture, then mixes."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.shift = nn.Linear(8, width)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        return hidden + self.mix(torch.relu(hidden + self.shift(time)[:, :, None, None]))


class Small(nn.Module):
    """A denoiser of two blocks, written by hand; the layer `spare` is never called."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)
        self.embed = nn.Linear(1, 8)
        self.enter = nn.Conv2d(3, 4, 1)
        self.leave = nn.Conv2d(4, 3, 1)
        self.blocks = nn.ModuleList([Block(4), Block(4)])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = torch.sin(self.embed(timestep[:, None] / 1000))
        hidden = self.enter(sample)
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.leave(hidden)


class Points(nn.Module):
    """A denoiser of points in the plane: its sample has two axes, like a condition."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.enter = nn.Linear(2, 8)
        self.leave = nn.Linear(8, 2)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.leave(torch.relu(self.enter(sample) + self.embed(timestep[:, None])))


class Choosy(Small):
    """Decides by a value, which a recording cannot see."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(sample * 2 if timestep.max() > 500 else sample, timestep)


def picture(batch: int = 2) -> dict[str, Tensor]:
    return {"sample": torch.randn(batch, 3, 8, 8), "timestep": torch.arange(1.0, batch + 1)}


def test_units_of_a_small_denoiser() -> None:
    adapter = adapt(Small(), picture())
    (temporal,) = adapter.temporal()
    assert temporal.layers == ("embed", "blocks.0.shift", "blocks.1.shift")
    assert temporal.features == ("blocks.0.shift", "blocks.1.shift")
    assert temporal.reads == ("timestep",)
    plain = [("enter",), ("blocks.0.mix",), ("blocks.1.mix",), ("leave",)]
    assert [unit.layers for unit in adapter.units()] == [temporal.layers, *plain]
    assert [unit.name for unit in adapter.blocks()] == ["blocks.0", "blocks.1"]
    assert (adapter.ends(), adapter.uncalled()) == (("enter", "leave"), ["spare"])


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_replay_of_a_small_denoiser(batch: int) -> None:
    model = Small()
    inputs = picture(batch)
    graph = adapt(model, picture()).block_graph(batch)
    assert torch.equal(graph.replay(model, inputs), model(**inputs))


def test_a_sample_of_two_axes_is_no_condition() -> None:
    adapter = adapt(Points(), {"sample": torch.randn(2, 2), "timestep": torch.ones(2)})
    assert [unit.layers for unit in adapter.temporal()] == [("embed",)]
    assert [unit.features for unit in adapter.temporal()] == [("embed",)]
    assert adapter.ends() == ("enter", "leave")


def test_a_subclass_of_a_known_model_is_known() -> None:
    class Mine(UNet2DModel):
        """Somebody's own name for it."""

    model = Mine(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    assert adapt(model).ends() == ("conv_in", "conv_out")


def test_an_unknown_model_without_an_example_is_refused() -> None:
    words = r"found Small; expected one of UNet2DModel, .*; pass example="
    with pytest.raises(BadInput, match=words):
        adapt(Small())


def test_an_example_without_a_timestep_is_refused() -> None:
    words = r"found Small with inputs sample; expected a denoiser called \(sample, timestep"
    with pytest.raises(BadInput, match=words):
        adapt(Small(), {"sample": torch.zeros(1, 3, 8, 8)})


def test_a_decision_by_value_is_refused() -> None:
    with pytest.raises(BadInput, match="found Choosy"):
        adapt(Choosy(), picture())


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match="found Small that fails on inputs sample, timestep, text"):
        adapt(Small(), picture() | {"text": torch.zeros(2, 5, 8)})
