"""Resamples from counts equal the metric of the drawn images; intervals have the right width."""

from itertools import permutations

import numpy as np
import pytest
from tiny_networks import features

from lowtide.evaluation.metrics import intervals, sets
from lowtide.evaluation.metrics.statistics import Statistics, frechet

COUNTS = intervals.draws(40, resamples=5)


def drawn(rows: np.ndarray, count: np.ndarray) -> np.ndarray:
    return rows.repeat(count.astype(int), axis=0)


def test_draws_are_seeded_and_complete() -> None:
    np.testing.assert_array_equal(COUNTS, intervals.draws(40, resamples=5))
    assert (COUNTS.sum(1) == 40).all() and len(np.unique(COUNTS, axis=0)) == 5


@pytest.mark.parametrize("width", [8, 64])
def test_frechets_are_those_of_the_drawn_images(width: int) -> None:
    """With fewer features than images, and with more."""
    ours = features(40, 1, width)
    reference = Statistics.of(features(90, 2, width))
    expected = [frechet(Statistics.of(drawn(ours, count)), reference) for count in COUNTS]
    np.testing.assert_allclose(intervals.frechets(ours, reference, COUNTS), expected, rtol=1e-6)


def test_frechets_of_a_singular_reference() -> None:
    ours = features(40, 1, 64)
    reference = Statistics.of(features(20, 2, 64))
    expected = [frechet(Statistics.of(drawn(ours, count)), reference) for count in COUNTS]
    np.testing.assert_allclose(intervals.frechets(ours, reference, COUNTS), expected, rtol=1e-6)


def test_kernel_distances_leave_copies_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "CHUNK", 7)
    ours = features(40, 40).astype(float)
    reference = features(30, 30).astype(float)
    once = np.ones((1, 40))
    whole = sets.kernel_distance(ours, reference, subsets=1, subset_size=30)
    own = intervals.kernel_distances(ours, reference, once)[0] + sets.within(reference)
    assert own == pytest.approx(
        sets.within(ours) + sets.within(reference) - 2 * sets.kernel(ours, reference).mean(),
        rel=1e-9,
    )
    assert np.isfinite(whole)
    number = COUNTS[0]
    values = sets.kernel(ours, ours)
    pairs = list(permutations(range(40), 2))
    total = sum(number[i] * number[j] * values[i, j] for i, j in pairs)
    within = total / sum(number[i] * number[j] for i, j in pairs)
    expected = within - 2 * sets.kernel(drawn(ours, number), reference).mean()
    assert intervals.kernel_distances(ours, reference, COUNTS)[0] == pytest.approx(
        expected, rel=1e-9
    )


def test_inception_scores_are_those_of_the_drawn_images() -> None:
    logits = features(40, 0, width=6, spread=0.5)
    expected = [sets.inception_score(drawn(logits, count), splits=1) for count in COUNTS]
    np.testing.assert_allclose(intervals.inception_scores(logits, COUNTS), expected, rtol=1e-9)


def test_recalls_leave_out_balls_that_were_not_drawn() -> None:
    ours = features(40, 1, width=6)
    reference = features(50, 2, width=6)
    reach = sets.radii(ours, 3)
    distance = np.linalg.norm(reference[:, None].astype(float) - ours, axis=2)
    inside = distance <= reach.numpy()
    expected = [inside[:, count > 0].any(1).mean() for count in COUNTS]
    np.testing.assert_allclose(intervals.recalls(ours, reference, COUNTS), expected, rtol=1e-12)
    assert sets.recall(ours, reference) == inside.any(1).mean() >= max(expected) > min(expected)


def test_interval_of_a_mean_is_as_wide_as_statistics_say() -> None:
    """1.96 standard errors to each side; 4000 resamples are exact to a few per cent."""
    values = np.random.default_rng(0).standard_normal(400)
    low, high = intervals.interval(
        values.mean(), intervals.means(values, intervals.draws(400, resamples=4000))
    )
    error = values.std() / 20
    assert (high - values.mean()) / error == pytest.approx(1.96, abs=0.1)
    assert (values.mean() - low) / error == pytest.approx(1.96, abs=0.1)


def test_interval_lies_around_the_value_though_resamples_are_biased() -> None:
    ours = features(40, 1, 64)
    reference = Statistics.of(features(90, 2, 64))
    value = frechet(Statistics.of(ours), reference)
    resamples = intervals.frechets(ours, reference, intervals.draws(40))
    repetition = "drawing with repetition increases the distance"
    assert np.quantile(resamples, 0.025) > value, repetition
    low, high = intervals.interval(value, resamples)
    assert low < value < high and high - low < 0.5 * value
