"""The weight in the order of the Triton kernels: its values, its size, and the way back."""

import pytest
import torch
from triton_layers import FORMATS, random_layer

from lowtide.formats import Affine, Mixed
from lowtide.kernels import unpack_weight
from lowtide.kernels.triton.resident import (
    RUN,
    ResidentWeight,
    checkpoint_codes,
    in_one_buffer,
    resident_weight,
)


def values(weight: ResidentWeight) -> torch.Tensor:
    """(rows, channels x taps), read byte by byte as the kernels read it."""
    found = torch.empty(weight.rows, weight.taps, weight.channels)
    for segment in weight.segments:
        bits = 8 // segment.per
        for row in range(len(segment.scale)):
            to = row if segment.place is None else int(segment.place[row])
            zero = 0 if segment.zero is None else int(segment.zero[row])
            for tap in range(weight.taps):
                for channel in range(weight.channels):
                    k = tap * weight.room + channel
                    run, inside = divmod(k, RUN * segment.per)
                    field, place = divmod(inside, RUN)
                    byte = int(segment.data[row, run * RUN + place])
                    code = byte if segment.per == 1 else (byte >> (bits * field)) & (2**bits - 1)
                    found[to, tap, channel] = (code - zero) * segment.scale[row]
    return found.transpose(1, 2).flatten(1)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("channels", "taps"), [(70, 1), (5, 4)])
def test_values_and_the_way_back(form, channels, taps):
    layer = random_layer(form, 9, channels * taps)
    weight = resident_weight(layer.packed, layer.grid, layer.spec, channels, taps)
    weight, buffer = in_one_buffer(weight)
    expected = unpack_weight(layer.packed, layer.grid, layer.spec).cpu()
    assert torch.equal(values(weight), expected)
    assert weight.nbytes == buffer.nbytes
    back = checkpoint_codes(weight, layer.grid, layer.spec)
    assert torch.equal(back.flatten(), layer.packed.flatten())


@pytest.mark.parametrize(("bits", "share"), [(8, 1), (6, 1), (4, 2), (3, 2), (2, 4), (1, 4)])
def test_a_value_takes_its_share_of_a_byte(bits, share):
    layer = random_layer(Affine(bits, signed=bits in (1, 8), axis=0), 6, 256)
    weight = resident_weight(layer.packed, layer.grid, layer.spec, 256, 1)
    assert weight.nbytes == 6 * 256 // share


def test_mixed_bits_are_one_segment_for_each_width():
    layer = random_layer(Mixed((2, 8, 4, 1, 3), signed=False), 5, 128)
    weight = resident_weight(layer.packed, layer.grid, layer.spec, 128, 1)
    assert [segment.per for segment in weight.segments] == [1, 2, 4]
    assert [segment.place.tolist() for segment in weight.segments] == [[1], [2, 4], [0, 3]]
