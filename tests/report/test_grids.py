"""The picture: images stand where they should, with the pixels they had."""

from pathlib import Path

import numpy as np
from PIL import Image

from lowtide.report.grids import Column, draw, grid, pixels, write_images


def test_pixels_round_and_clip() -> None:
    values = np.array([-1, 0, 0.5, 1, 2], np.float32).reshape(1, 1, 5, 1)
    assert pixels(values).ravel().tolist() == [0, 0, 128, 255, 255]


def test_grid_places_every_image() -> None:
    images = np.linspace(0.1, 0.9, 8, dtype=np.float32).reshape(8, 1, 1, 1) * np.ones(
        (8, 4, 6, 1), np.float32
    )
    sheet = grid(images)
    assert sheet.shape == (3 * 5 + 1, 3 * 7 + 1, 3)
    for place, image in enumerate(pixels(images)):
        top = place // 3 * 5 + 1
        left = place % 3 * 7 + 1
        assert (sheet[top : top + 4, left : left + 6] == image).all()
    assert (sheet[::5] == 255).all() and (sheet[11:15, 15:] == 255).all()


def test_images_are_named_by_their_seed(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((2, 4, 4, 3), np.float32)
    write_images(tmp_path, images, (7, 123))
    assert (np.asarray(Image.open(tmp_path / "seed-000123.png")) == pixels(images)[1]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grid.png",
        "seed-000007.png",
        "seed-000123.png",
    ]


def test_picture_holds_the_grids_side_by_side(tmp_path: Path) -> None:
    """Red on the left, blue on the right, as large as each other, on white."""
    red = np.zeros((4, 8, 8, 3), np.float32)
    red[..., 0] = 1
    blue = np.zeros((4, 8, 8, 3), np.float32)
    blue[..., 2] = 1
    table = [["model", "size"], ["red", "1 MB"], ["blue", "2 MB"]]
    draw(
        tmp_path / "picture.png",
        "Two colours",
        [Column("red", "left", red), Column("blue", "right", blue)],
        table,
    )
    picture = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    reds = (picture == (255, 0, 0)).all(2)
    blues = (picture == (0, 0, 255)).all(2)
    assert reds.sum() == blues.sum() > 0.1 * picture.shape[0] * picture.shape[1]
    assert np.flatnonzero(reds.any(0)).max() < np.flatnonzero(blues.any(0)).min()
    assert (picture[:10] == 255).all() and (picture[-10:] == 255).all()
