"""Scores: what is asked for is checked before anything is drawn; gates compare the right numbers."""

import numpy as np
import pytest
from PIL import Image

from lowtide.errors import BadInput
from lowtide.evaluation import scores
from lowtide.evaluation.metrics import Statistics


def test_what_is_measured_if_nobody_says():
    rule = scores.ruler(None, None, {})
    assert (
        rule.pairs() == ["psnr", "ssim"]
        and rule.sets() == []
        and "latent_mse" in rule.names
        and not rule.asked
    )


def test_a_gate_brings_its_metric():
    assert scores.ruler(["ssim"], None, {"min-psnr": 20.0}).pairs() == ["ssim", "psnr"]


@pytest.mark.parametrize(
    ("metrics", "dataset", "gates", "words"),
    [
        (["beauty"], None, {}, "found metric 'beauty'"),
        (["fd"], None, {}, "found fd and no data set"),
        (None, None, {"max-fd-increase": 1.0}, "found fd and no data set"),
        (["precision"], "nowhere", {}, "found nothing at nowhere"),
        (None, None, {"min-ssim": 0.9}, "found gate 'min-ssim'"),
        (["fid", "fd-efficientnet"], "nowhere", {}, "fd-efficientnet"),
    ],
)
def test_what_cannot_be_measured(metrics, dataset, gates, words):
    with pytest.raises(BadInput, match=words):
        scores.ruler(metrics, dataset, gates)


def test_the_network_that_a_name_tells():
    names = {
        "fid": "inception",
        "is": "inception",
        "fd-dinov2": "dinov2",
        "kd-efficientnet": "efficientnet",
        "fd": None,
        "psnr": None,
    }
    assert {name: scores.looker(name) for name in names} == names


def model(**values):
    return {"metrics": {name.replace("_", "-"): {"value": value} for name, value in values.items()}}


def test_gates():
    models = {
        "float": model(fd_efficientnet=10.0),
        "good": model(psnr=30.0, lpips=0.1, fd_efficientnet=10.5),
        "bad": model(psnr=20.0, lpips=0.3, fd_efficientnet=14.0),
        "broken": model(psnr=float("nan"), lpips=float("nan"), fd_efficientnet=float("nan")),
    }
    limits = {"min-psnr": 30.0, "max-lpips": 0.1, "max-fd-increase": 0.5}
    rule = scores.Ruler(("psnr", "lpips", "fd"), "efficientnet", None, limits, True)
    found = scores.judged(rule, models, "float")
    assert [(gate["name"], gate["model"]) for gate in found if gate["passed"]] == [
        (name, "good") for name in limits
    ]
    assert len(found) == 9
    assert (
        next(
            gate["value"]
            for gate in found
            if gate["name"] == "max-fd-increase" and gate["model"] == "bad"
        )
        == 4.0
    )


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_a_data_set_of_images(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        write(tmp_path / "set" / f"class{number % 2}" / f"{number}.png", picture)
    colour = scores.reference_set(tmp_path / "set", np.zeros((1, 8, 8, 3)))
    assert np.array_equal(
        colour[np.argsort(colour.sum((1, 2, 3)))],
        np.float32(pictures / 255)[np.argsort(pictures.sum((1, 2, 3)))],
    )
    assert scores.reference_set(tmp_path / "set", np.zeros((1, 8, 8, 1))).shape == (3, 8, 8, 1)
    with pytest.raises(BadInput, match="found images of 8 x 8"):
        scores.reference_set(tmp_path / "set", np.zeros((1, 16, 16, 3)))
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInput, match="found no images"):
        scores.reference_set(tmp_path / "none", np.zeros((1, 8, 8, 3)))


def test_a_data_set_of_statistics(tmp_path):
    Statistics.of(np.eye(3), size=(8, 8)).save(tmp_path / "x.npz")
    assert np.array_equal(
        scores.reference_set(tmp_path / "x.npz", np.zeros((1, 8, 8, 3))).outer, np.eye(3)
    )
