"""Data sets: read as images or statistics; what cannot be read is refused before sampling."""

import numpy as np
import pytest
from PIL import Image
from torch import nn

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import Extractor, Origin, Statistics
from lowtide.evaluation.reference_dataset import check_dataset, check_statistics, load_dataset

COLOUR = np.zeros((1, 8, 8, 3))
GREY = np.zeros((1, 8, 8, 1))


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def random_images(count, size=8):
    shape = (count, size, size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def by_sum(images):
    return images[np.argsort(images.sum((1, 2, 3)))]


def test_images(tmp_path):
    images = random_images(3)
    for number, image in enumerate(images):
        write(tmp_path / "set" / f"class{number % 2}" / f"{number}.png", image)
    check_dataset(["fd"], tmp_path / "set")
    loaded = load_dataset(tmp_path / "set", COLOUR)
    assert np.array_equal(by_sum(loaded), np.float32(by_sum(images) / 255))
    assert load_dataset(tmp_path / "set", GREY).shape == (3, 8, 8, 1)
    with pytest.raises(BadInput, match="found images of 8 x 8"):
        load_dataset(tmp_path / "set", np.zeros((1, 16, 16, 3)))


def test_a_folder_without_images(tmp_path):
    with pytest.raises(BadInput, match="found no images"):
        check_dataset(["fd"], tmp_path)
    with pytest.raises(BadInput, match="found no images"):
        load_dataset(tmp_path, COLOUR)


def test_images_of_two_sizes(tmp_path):
    write(tmp_path / "0.png", random_images(1)[0])
    write(tmp_path / "1.png", random_images(1, size=16)[0])
    with pytest.raises(BadInput, match=r"found images of 8 x 8 and 16 x 16 in .*one size"):
        check_dataset(["fd"], tmp_path)


def damaged(content):
    """The bytes of a PNG file with one changed byte inside its pixels."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: b"no image",
        lambda content: content[: len(content) // 2],
        damaged,
    ],
    ids=["empty", "text", "truncated", "changed"],
)
def test_a_bad_image_is_refused_before_sampling(change, tmp_path):
    for number, image in enumerate(random_images(2)):
        write(tmp_path / f"{number}.png", image)
    bad = tmp_path / "1.png"
    bad.write_bytes(change(bad.read_bytes()))
    sentence = r"found .*1\.png, which is no readable image; expected an image file"
    with pytest.raises(BadInput, match=sentence):
        check_dataset(["fd"], tmp_path)
    with pytest.raises(BadInput, match=sentence):
        load_dataset(tmp_path, COLOUR)


def test_statistics(tmp_path):
    path = tmp_path / "x.npz"
    Statistics.of(np.eye(3), size=(8, 8)).save(path)
    check_dataset(["fd"], path)
    assert np.array_equal(load_dataset(path, COLOUR).outer, np.eye(3))


@pytest.mark.parametrize("content", [b"", b"no statistics", b"PK\x03\x04"])
def test_unreadable_statistics_are_refused_before_sampling(content, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"found no statistics in .*x\.npz"):
        check_dataset(["fd"], path)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (["kd"], "found statistics alone for kd; expected the images"),
        (["fd", "precision"], "found statistics alone for precision"),
        (["sfd"], "found statistics of net pooled hash for sfd; expected .* of net spatial hash"),
    ],
)
def test_statistics_of_other_features_are_refused_before_sampling(metrics, words):
    extractor = Extractor("net", nn.Identity(), Origin("test", "hash"))
    statistics = Statistics.of(np.eye(3), source=extractor.source("pooled"), size=(8, 8))
    check_statistics(["fd"], statistics, extractor)
    with pytest.raises(BadInput, match=words):
        check_statistics(metrics, statistics, extractor)


def test_metrics_that_need_a_data_set(tmp_path):
    check_dataset([], None)
    with pytest.raises(BadInput, match="found fd and no data set"):
        check_dataset(["fd"], None)
    with pytest.raises(BadInput, match="found nothing at"):
        check_dataset([], tmp_path / "nowhere")
