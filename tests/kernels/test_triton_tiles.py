"""The table of tiles: what is chosen fits the card and the product."""

import pytest

from lowtide.kernels.triton.tiles import CARDS, INTERPRETER, Shape, card_of, choose

REAL = [capability for capability in CARDS if capability != INTERPRETER]


@pytest.mark.parametrize("capability", REAL, ids=str)
@pytest.mark.parametrize("run", [64, 128])
@pytest.mark.parametrize("room", [320, 640, 1152])
def test_every_shape_has_a_tile(capability, run, room):
    step = -(-room // run) * run
    for rows in (1, 77, 512, 8192):
        chosen = choose(capability, Shape(rows, room, 9 * step, run, step, 256 * 128))
        tile = chosen.tile
        assert tile in card_of(capability).tiles
        assert step % tile.k == 0
        assert tile.k % run == 0


@pytest.mark.parametrize("capability", REAL, ids=str)
def test_the_pipeline_of_every_tile_fits_in_shared_memory(capability):
    card = card_of(capability)
    for tile in card.tiles:
        assert tile.stages * (tile.rows + tile.columns) * tile.k <= card.shared


def test_few_pixels_and_many_channels_are_split():
    small = choose((9, 0), Shape(128, 1280, 9 * 1280, 64, 1280, 256 * 128))
    large = choose((9, 0), Shape(8192, 1280, 9 * 1280, 64, 1280, 256 * 128))
    assert small.split > 1
    assert large.split == 1
    assert large.tile.rows * large.tile.columns > small.tile.rows * small.tile.columns


def test_a_card_that_is_not_listed_counts_as_the_one_before():
    assert card_of((9, 1)) is card_of((9, 0))
    assert card_of((8, 7)) is card_of((8, 6))
    assert card_of((12, 0)) is card_of((9, 0))
