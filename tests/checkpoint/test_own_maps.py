"""Tensors with maps of their own: the same bytes, and no other map is needed."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowtide.checkpoint.own_maps import MAPS, SMALL, spans, with_own_maps

STATE = {
    "large": torch.arange(3 * SMALL, dtype=torch.int32),
    "odd": torch.arange(SMALL + 3).to(torch.uint8),
    "small": torch.randn(5, 7),
    "empty": torch.empty(0),
}


@pytest.fixture
def path(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_the_bytes_are_those_of_the_file(path):
    places = spans([path])
    assert {name: place.count for name, place in places.items()} == {
        name: tensor.nbytes for name, tensor in STATE.items()
    }
    own = with_own_maps(load_file(path), places)
    assert own.keys() == STATE.keys()
    for name, tensor in own.items():
        assert tensor.dtype == STATE[name].dtype
        assert torch.equal(tensor, STATE[name])


@pytest.mark.skipif(not MAPS.exists(), reason="the maps of a process are known on Linux only")
def test_no_tensor_stays_in_the_map_of_the_whole_file(path):
    mapped = load_file(path)
    own = with_own_maps(mapped, spans([path]))
    assert own is not mapped
    for name in ("large", "odd", "small"):
        assert own[name].data_ptr() != mapped[name].data_ptr()
    own["large"] += 1
    assert torch.equal(load_file(path)["large"], STATE["large"])


def test_tensors_that_are_not_mapped_stay_as_they_are(path):
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    assert with_own_maps(state, spans([path])) is state
    assert with_own_maps(state, {}) is state
