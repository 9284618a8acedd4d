"""Set metrics equal torchmetrics, torch-fidelity and their definitions on the same features."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_networks import features
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import sets
from lowtide.evaluation.metrics.statistics import Statistics, frechet


@pytest.fixture(scope="module")
def fidelity() -> Any:
    """torch-fidelity, if a torchvision fits the installed torch."""
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity does not import: {error}")
    return torch_fidelity


class Identity(nn.Module):
    """Returns features unchanged, so that torchmetrics measures the same features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def image_like(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows)[:, :, None, None].double()


def test_frechet_is_torchmetrics() -> None:
    ours = features(300, 1)
    reference = features(500, 2, spread=1.2)
    metric = FrechetInceptionDistance(Identity(), input_img_size=(24, 1, 1)).set_dtype(
        torch.float64
    )
    metric.update(image_like(ours), real=False)
    metric.update(image_like(reference), real=True)
    assert frechet(Statistics.of(ours), Statistics.of(reference)) == pytest.approx(
        float(metric.compute()), rel=1e-6
    )


def test_frechet_is_torch_fidelity(fidelity: Any) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    both = [features(300, 1), features(500, 2, spread=1.2)]
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.from_numpy(each).double()) for each in both), False
    )
    ours = frechet(*map(Statistics.of, both))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_frechet_of_known_gaussians() -> None:
    """One axis each: (mean difference)^2 + (difference of standard deviations)^2, exactly."""
    x = np.array([[-1.0, -2.0], [1.0, -2.0], [-1.0, 2.0], [1.0, 2.0]])
    moved = x * [3, 1] + [5, 0]
    assert frechet(Statistics.of(moved), Statistics.of(x)) == pytest.approx(
        25 + (4 / 3) * 4, rel=1e-12
    )


def test_frechet_of_few_images_is_stable() -> None:
    """Fewer images than features: both covariances are singular, and the distance is zero."""
    few = Statistics.of(features(10, 1, width=64))
    assert abs(frechet(few, few)) < 1e-6 * np.trace(few.covariance)


def test_kernel_distance_is_torchmetrics() -> None:
    """Subsets as large as the sets are not random."""
    ours = features(200, 1)
    reference = features(200, 2)
    metric = KernelInceptionDistance(Identity(), subsets=2, subset_size=200).set_dtype(
        torch.float64
    )
    metric.update(image_like(ours), real=False)
    metric.update(image_like(reference), real=True)
    assert sets.kernel_distance(ours, reference, subsets=2) == pytest.approx(
        float(metric.compute()[0]), rel=1e-6
    )


def test_kernel_distance_is_torch_fidelity(fidelity: Any) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    ours, reference = (features(300, seed).astype(np.float64) for seed in (1, 2))
    theirs = kid_features_to_metric(
        torch.from_numpy(ours),
        torch.from_numpy(reference),
        kid_subset_size=100,
        rng_seed=sets.SEED,
        verbose=False,
    )
    distance = sets.kernel_distance(ours, reference, subset_size=100)
    assert distance == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)


def test_kernel_distance_is_seeded() -> None:
    ours = features(60, 1)
    reference = features(60, 2)
    one, again, other = (
        sets.kernel_distance(ours, reference, subset_size=20, seed=seed) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_inception_score_is_torchmetrics() -> None:
    """In one split, because torchmetrics shuffles in another order."""
    logits = features(200, 0, width=10, spread=0.5)
    metric = InceptionScore(Identity(), splits=1)
    metric.update(image_like(logits))
    theirs = float(metric.compute()[0])
    assert theirs > 1.5
    assert sets.inception_score(logits, splits=1) == pytest.approx(theirs, rel=1e-6)


def test_inception_score_is_torch_fidelity(fidelity: Any) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = features(203, 0, width=10, spread=0.5)
    theirs = isc_features_to_metric(torch.from_numpy(logits))["inception_score_mean"]
    assert sets.inception_score(logits) == pytest.approx(theirs, rel=1e-6)


def test_inception_score_of_a_class_without_images() -> None:
    logits = np.full((20, 3), -2000.0)
    logits[:10, 0] = 0
    logits[10:, 1] = 0
    assert sets.inception_score(logits, splits=1) == pytest.approx(2, rel=1e-9)


def by_definition(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """Precision as the paper defines it, one pair at a time."""
    reach = [sorted(distances(centre, centres))[k] for centre in centres]
    inside = [in_a_ball(point, centres, reach) for point in points]
    return float(np.mean(inside))


def in_a_ball(point: np.ndarray, centres: np.ndarray, reach: list[float]) -> bool:
    pairs = zip(distances(point, centres), reach, strict=True)
    return any(distance <= radius for distance, radius in pairs)


def distances(point: np.ndarray, others: np.ndarray) -> list[float]:
    return [float(np.linalg.norm(point - other)) for other in others]


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_follow_the_definition(
    neighbours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "CHUNK", 17)
    ours = features(50, 1, width=8).astype(float)
    reference = features(70, 2, width=8).astype(float)
    precision = sets.precision(ours, reference, neighbours=neighbours)
    recall = sets.recall(ours, reference, neighbours=neighbours)
    assert precision == by_definition(ours, reference, neighbours)
    assert recall == by_definition(reference, ours, neighbours)
    assert 0 < recall < 1
    assert 0 < precision < 1
    assert recall != precision


def test_precision_and_recall_are_torch_fidelity(fidelity: Any) -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    ours = features(150, 1, width=6, spread=0.7)
    reference = features(170, 2, width=6)
    theirs = calculate_precision_recall_full(
        *(torch.from_numpy(each).double() for each in (ours, reference)), 3
    )
    assert (sets.precision(ours, reference), sets.recall(ours, reference)) == pytest.approx(
        theirs, rel=1e-6
    )


def test_clip_scores_are_cosines() -> None:
    images = np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    texts = np.array([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(sets.clip_scores(images, texts), [100, 60, 0], rtol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: sets.inception_score(x),
        lambda x: sets.precision(x, x),
        lambda x: sets.kernel_distance(x, x),
    ],
)
def test_too_few_images_say_so(call: Any) -> None:
    with pytest.raises(BadInput, match=r"found 1 of the images .*; expected at least"):
        call(features(1, 1))
