"""Layouts, held against tensors with data: the pixels that a layout names are the tensor's own."""

import pytest
import torch
from torch import Tensor

from lowtide.runtime.layouts import (
    Layout,
    Padding,
    channel_axis,
    code_layout,
    dense_like,
    is_dense,
    layout_of,
    merged_stride,
    pixel_shape,
    pixels_of,
    same_order,
    tokens_of,
    vector_over,
)


def image(batch: int = 2, channels: int = 3, height: int = 4, width: int = 5) -> Tensor:
    values = torch.arange(float(batch * channels * height * width))
    return values.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def read(x: Tensor, layout: Layout) -> Tensor:
    """The pixels of a layout as (B, H * W, C)."""
    sizes = (layout.batch, layout.height, layout.width, layout.channels)
    strides = (layout.sample, layout.row, layout.column, 1)
    return x.as_strided(sizes, strides).reshape(layout.batch, -1, layout.channels)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x[:, :, 1:, ::2],
        lambda x: x[:, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(2, 3, 4, 5),
        lambda x: x[:, :1].contiguous(),
    ],
)
def test_pixels_are_those_of_the_image(change):
    x = change(image())
    layout = pixels_of(x)
    assert layout is not None
    assert torch.equal(read(x, layout), x.flatten(2).transpose(1, 2))


def test_images_whose_channels_lie_apart_have_no_pixels():
    assert pixels_of(image().contiguous()) is None
    assert pixels_of(image()[:, ::2]) is None
    assert pixels_of(image()[0]) is None


@pytest.mark.parametrize(
    "shape", [(4, 6), (2, 5, 6), (2, 5, 7, 6), (2, 1, 5, 6), (1, 5, 1, 6), (2, 3, 4, 5, 6)]
)
def test_tokens_are_those_of_the_tensor(shape):
    x = torch.randn(shape)
    layout = tokens_of(x)
    assert layout is not None
    assert torch.equal(read(x, layout), x.reshape(shape[0], -1, shape[-1]))


def test_tokens_that_no_single_stride_reaches():
    x = torch.randn(2, 5, 7, 6)
    assert tokens_of(x[:, :, 1:]) is None
    assert tokens_of(x[:, 1:]) is not None
    assert tokens_of(x.transpose(1, 2)) is None
    assert tokens_of(x.transpose(2, 3)) is None
    assert tokens_of(x[0, 0, 0]) is None


@pytest.mark.parametrize(
    ("sizes", "strides", "merged"),
    [
        ((), (), 0),
        ((1, 1), (7, 3), 0),
        ((4,), (9,), 9),
        ((3, 4), (8, 2), 2),
        ((3, 4), (9, 2), None),
        ((3, 1, 4), (8, 77, 2), 2),
        ((2, 3), (0, 0), 0),
    ],
)
def test_merged_stride(sizes, strides, merged):
    assert merged_stride(sizes, strides) == merged


def test_reshaped_layouts_have_the_same_pixels():
    x = image()
    layout = pixels_of(x)
    for size in ((1, 20), (20, 1), (2, 10), (5, 4)):
        reshaped = layout.reshaped(*size)
        assert reshaped.size == size
        assert torch.equal(read(x, reshaped), read(x, layout))
    assert layout.reshaped(3, 5) is None
    assert pixels_of(x[:, :, :, 1:]).as_line() is None
    assert pixels_of(x[:, :, :, 1:]).reshaped(4, 4) is not None
    column = x[:, :, :, 2:3]
    assert torch.equal(read(column, pixels_of(column).as_line()), read(column, pixels_of(column)))


def test_the_axis_of_the_channels():
    assert channel_axis(image()) == 1
    assert channel_axis(image().permute(0, 2, 3, 1)) == 3
    assert channel_axis(torch.empty(2, 5, 6)) == 2
    assert channel_axis(torch.empty(2, 5, 6).transpose(1, 2)) == 1
    assert channel_axis(torch.empty(4, 6)) == 1


def test_a_sequence_is_read_by_its_channels():
    x = torch.randn(2, 5, 6).transpose(1, 2)
    layout = layout_of(x)
    assert (layout.pixels, layout.channels) == (5, 6)
    assert torch.equal(read(x, layout), x.transpose(1, 2))
    assert same_order(dense_like(x), x)


def test_dense_tensors_have_neither_gaps_nor_repeats():
    assert all(map(is_dense, (image(), image().contiguous(), torch.empty(1, 3, 1), image()[:1])))
    assert not any(
        map(is_dense, (image()[:, 1:], image()[:, :, ::2], image()[:1].expand(2, 3, 4, 5)))
    )


def test_same_order():
    assert same_order(image(), pixel_shape(2, 4, 5, 3))
    assert same_order(image(), torch.empty(2, 20, 3))
    assert not same_order(image(), image().contiguous())
    assert not same_order(image()[:, 1:], torch.empty(2, 20, 2))
    assert same_order(torch.empty(1, 5, 3), torch.empty_strided((1, 5, 3), (99, 3, 1)))


LIKES = {
    "image": pixel_shape(2, 4, 5, 3),
    "tokens": torch.empty(2, 7, 3, device="meta"),
    "sequence": torch.empty(2, 7, 3, device="meta").transpose(1, 2),
    "matrix": torch.empty(2, 3, device="meta"),
    "grid": torch.empty(2, 4, 5, 3, device="meta"),
}


@pytest.mark.parametrize("like", LIKES)
@pytest.mark.parametrize(
    "shape",
    [
        (3,),
        (1, 3),
        (2, 3),
        (2, 1, 3),
        (1, 1, 3),
        (2, 3, 1),
        (3, 1),
        (3, 1, 1),
        (2, 3, 1, 1),
        (1, 3, 1, 1),
        (2, 1, 1, 3),
        (1,),
        (7, 1),
        (2, 1, 1, 1),
        (2, 1, 1, 1, 3),
    ],
)
def test_a_vector_broadcasts_as_torch_says(like, shape):
    """Where a vector is found, adding it by sample and channel is what torch adds."""
    meta = LIKES[like]
    other = torch.randn(shape)
    vector = vector_over(other, meta)
    axis = channel_axis(meta)
    try:
        expected = torch.zeros(meta.shape) + other
    except RuntimeError:
        expected = torch.empty(0)
    if vector is None:
        return
    assert expected.shape == meta.shape
    found = torch.zeros(meta.shape).movedim(axis, -1)
    found = found + vector.reshape(vector.shape[0], *[1] * (found.dim() - 2), vector.shape[1])
    assert torch.equal(found.movedim(-1, axis), expected)


@pytest.mark.parametrize(
    ("like", "shape", "found"),
    [
        ("image", (2, 3, 1, 1), (2, 3)),
        ("image", (3, 1, 1), (1, 3)),
        ("tokens", (3,), (1, 3)),
        ("tokens", (2, 1, 3), (2, 3)),
        ("sequence", (3, 1), (1, 3)),
        ("matrix", (1, 3), (1, 3)),
        ("matrix", (2, 3), None),
        ("tokens", (7, 3), None),
        ("image", (2, 3, 4, 5), None),
    ],
)
def test_vectors(like, shape, found):
    vector = vector_over(torch.empty(shape), LIKES[like])
    assert (None if vector is None else tuple(vector.shape)) == found


def test_a_vector_that_is_no_vector_in_memory():
    assert vector_over(torch.empty(2, 6)[:, ::2][:, :, None, None], LIKES["image"]) is None
    assert vector_over(torch.empty(3, dtype=torch.float64), LIKES["tokens"]) is None
    chunk = torch.arange(12.0).reshape(2, 6)[:, 3:]
    assert vector_over(chunk[:, None], LIKES["tokens"]).tolist() == [[3, 4, 5], [9, 10, 11]]


def test_codes_are_whole_dwords_upsampled_then_padded():
    codes = code_layout(pixels_of(image()), 2, Padding(above=1, left=2, below=3, right=4))
    assert codes == Layout(2, 4 * 2 + 4, 5 * 2 + 6, 4, 12 * 16 * 4, 16 * 4, 4)
