"""PSNR, SSIM and LPIPS agree with torchmetrics on the same images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_networks import images, noisy
from torch import nn
from torchmetrics.functional.image import lpips as reference_lpips
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import lpips, pairs


def first(batch: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_is_torchmetrics(channels: int) -> None:
    clean = images(6, channels=channels)
    damaged = noisy(clean, 0.1)
    theirs = peak_signal_noise_ratio(
        first(damaged), first(clean), data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    np.testing.assert_allclose(pairs.each_psnr(damaged, clean), theirs, rtol=1e-6)
    assert pairs.psnr(damaged, clean) == pytest.approx(float(theirs.mean()), rel=1e-6)


def test_psnr_of_identical_images_is_100() -> None:
    assert pairs.psnr(images(3), images(3)) == 100


@pytest.mark.parametrize("shape", [(16, 16), (6, 40), (33, 24)])
def test_ssim_is_torchmetrics(shape: tuple[int, int]) -> None:
    clean = images(4, size=40)[:, : shape[0], : shape[1]]
    damaged = noisy(clean, 0.15)
    theirs = structural_similarity_index_measure(
        first(damaged), first(clean), data_range=1.0, reduction="none"
    )
    np.testing.assert_allclose(pairs.each_ssim(damaged, clean), theirs, rtol=1e-6)
    assert pairs.ssim(clean, clean) == pytest.approx(1, abs=1e-12)


def test_ssim_says_how_small_is_too_small() -> None:
    with pytest.raises(BadInput, match="found images of 5 x 5; expected at least 6 x 6"):
        pairs.ssim(images(2)[:, :5, :5], images(2)[:, :5, :5])


def test_latent_mse_is_of_each_sample() -> None:
    latents = np.zeros((2, 4, 3, 3), np.float32)
    moved = latents + np.array([0.5, 2.0], np.float32)[:, None, None, None]
    np.testing.assert_array_equal(pairs.latent_mse(moved, latents), [0.25, 4.0])


@pytest.fixture
def alexnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of random AlexNet weights, which torchmetrics uses as well."""
    torch.manual_seed(0)
    features = nn.Sequential()
    for place, shape in zip(lpips.PLACES, lpips.CONVOLUTIONS, strict=True):
        while len(features) < place:
            features.append(nn.MaxPool2d(3, 2))
        features.extend([nn.Conv2d(*shape), nn.ReLU()])
    monkeypatch.setattr(
        reference_lpips, "_get_tv_model_features", lambda name, pretrained: features
    )
    path = tmp_path / lpips.BACKBONE
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("size", [32, 64])
def test_lpips_is_torchmetrics(alexnet: Path, size: int) -> None:
    clean = images(40, size=size)
    damaged = noisy(clean, 0.1)
    net, origin = lpips.load(alexnet)
    theirs = reference_lpips._NoTrainLpips(net="alex")(
        first(damaged).float(), first(clean).float(), normalize=True
    )
    ours = lpips.each_lpips(net, damaged, clean)
    np.testing.assert_allclose(ours, theirs.flatten(), rtol=1e-5)
    assert ours.min() > 1e-4
    assert lpips.each_lpips(net, clean, clean).max() == 0
    assert origin.weights.count("sha256:") == 2


def test_lpips_says_where_its_weights_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = f"{tmp_path}/lowtide/metrics/{lpips.BACKBONE}"
    with pytest.raises(BadInput, match=f"expected the file {lpips.BACKBONE}; put it at {place}"):
        lpips.load()


def test_lpips_says_how_small_is_too_small(alexnet: Path) -> None:
    net, _ = lpips.load(alexnet)
    with pytest.raises(BadInput, match="at least 31 x 31 for LPIPS"):
        lpips.each_lpips(net, images(2, size=28), images(2, size=28))


def test_lpips_names_what_a_file_lacks(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "half.pth")
    with pytest.raises(BadInput, match=r"without 'features\.0\.bias'"):
        lpips.load(tmp_path / "half.pth")
