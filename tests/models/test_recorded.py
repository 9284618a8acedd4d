"""Architectures recorded from two calls: batch axes, frames, JSON, casts, cached methods."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from lowtide.models import adapt
from lowtide.models.described import described, described_adapter
from lowtide.models.generic import recorded_architecture
from lowtide.models.named_inputs import flat_inputs, mapped_inputs
from lowtide.nn.feature_cache import one_row_each
from lowtide.sampling.request import Moment, joined_moments
from lowtide.stages.base import part_of

FRAMES = 3
WIDTH = 8


class Film(nn.Module):
    """A denoiser of videos: frames are folded into the batch, and a table is shared by all."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, WIDTH)
        self.text = nn.Linear(4, WIDTH)
        self.enter = nn.Linear(2, WIDTH)
        self.shift = nn.Linear(WIDTH, WIDTH)
        self.leave = nn.Linear(WIDTH, 2)

    @lru_cache  # noqa: B019 - as diffusers caches frequencies
    def _ramp(self, device: torch.device) -> Tensor:
        return torch.arange(WIDTH, device=device) / WIDTH

    def forward(self, sample: Tensor, timestep: Tensor, texts: list[Tensor], table: Tensor):
        time = self.embed(timestep[:, None].float()).type_as(texts[0]).repeat_interleave(FRAMES, 0)
        hidden = self.enter(sample.flatten(0, 1)) + self.text(texts[0])
        hidden = hidden + self.shift(time) + self._ramp(sample.device) + table[0]
        return self.leave(hidden).unflatten(0, (len(sample), FRAMES))


def call(images: int) -> dict:
    return {
        "sample": torch.randn(2 * images, FRAMES, 2),
        "timestep": torch.full((2 * images,), 7.0),
        "texts": [torch.randn(2 * images * FRAMES, 4)],
        "table": torch.randn(4, WIDTH),
    }


def architecture():
    return recorded_architecture(Film(), call(1), call(2))


def test_two_calls_tell_what_has_a_batch_axis():
    found = architecture()
    assert found.shared == ("table",)
    assert found.repeated == {"texts.0": FRAMES}
    sizes = {name: len(each) for name, each in flat_inputs(found.example(Film(), 5)).items()}
    assert sizes == {"sample": 5, "timestep": 5, "texts.0": 5 * FRAMES, "table": 4}


def test_the_temporal_block_is_found_through_a_cast_and_frames():
    model = Film()
    adapter = adapt(model, call(2), architecture())
    (unit,) = adapter.temporal()
    assert (unit.layers, unit.reads, unit.features) == (
        ("embed", "shift"),
        ("timestep",),
        ("shift",),
    )
    times = torch.tensor([1.0, 500.0])
    (answer,) = adapter.temporal_graph(unit, 2).replay(model, {"timestep": times})
    assert answer.shape == (2 * FRAMES, WIDTH)
    expected = model.shift(model.embed(times[:, None]))
    assert torch.allclose(one_row_each(answer, 2), expected)
    assert one_row_each(expected, 2) is expected


def test_json_describes_the_same_architecture():
    found = architecture()
    data = described(found)
    again = described_adapter(Film(), data).architecture
    assert described(again) == data
    assert again.shared == found.shared and again.repeated == found.repeated
    assert data["inputs"]["texts"] == {"list": [{"tensor": [4 * FRAMES, 4], "dtype": "float32"}]}


def test_a_part_of_a_call_has_the_frames_of_its_samples():
    model = Film().eval()
    adapter = adapt(model, call(2), architecture())
    whole = call(2)
    part = part_of(whole, slice(1, 3), adapter)
    assert torch.allclose(model(**part), model(**whole)[1:3], atol=1e-6)


def test_a_recording_leaves_no_cached_tensor_behind():
    model = Film()
    for batch in (2, 3):
        adapt(model, call(1), architecture()).layer_graph(batch)
    assert model(**call(1)).device.type == "cpu"


def test_parts_of_a_batch_are_joined_in_lists_too():
    parts = [
        Moment(0, torch.zeros(2), {"x": [torch.full((2, 1), float(each))]}, torch.zeros(2, 1))
        for each in range(2)
    ]
    joined = joined_moments(parts, [1, 1])
    assert joined.arguments["x"][0].flatten().tolist() == [0.0, 1.0, 0.0, 1.0]


def test_names_of_nested_inputs_are_those_of_the_flat_ones():
    inputs = {"a": torch.zeros(1), "b": {"c": (torch.ones(1), 3)}, "d": None}
    names: list[str] = []
    mapped = mapped_inputs(inputs, lambda name, tensor: names.append(name) or tensor)
    assert names == list(flat_inputs(inputs)) == ["a", "b.c.0"]
    assert mapped["b"]["c"][1] == 3 and mapped["d"] is None
