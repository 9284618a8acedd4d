"""Tail likelihoods: each law wins on its own data; the numbers equal the powerlaw package's."""

import numpy as np
import powerlaw
import pytest
from scipy import stats

from lowtide.stages.power_law import exponential, log_normal, power_law, power_law_wins

RANDOM = np.random.default_rng(0)
DATA = {
    "power law": (1 + RANDOM.pareto(1.5, 4000)) * 0.01,
    "exponential": 0.01 + RANDOM.exponential(0.02, 4000),
}


def test_each_law_wins_on_its_own_data():
    assert power_law_wins(DATA["power law"], ("exponential",), 1.0) > 0.1
    assert power_law_wins(DATA["exponential"], ("exponential",), 1.0) < -0.05
    assert power_law_wins(np.exp(RANDOM.normal(0, 0.3, 4000)), ("log_normal",), 1.0) < -0.05
    assert power_law_wins(np.full(100, 0.3), ("exponential",), 1.0) == -np.inf


@pytest.mark.parametrize("kind", DATA)
def test_the_numbers_are_those_of_the_powerlaw_package(kind):
    x = np.sort(DATA[kind])
    theirs = powerlaw.Fit(x, xmin=x[0], verbose=0)
    for name, ours in (("exponential", exponential), ("lognormal", log_normal)):
        ratio, _ = theirs.distribution_compare("power_law", name)
        difference = power_law(x, x[0]) - ours(x, x[0])
        # Their search for the log-normal stops a little earlier or later than ours.
        assert difference == pytest.approx(ratio, rel=0.02, abs=5.0)


@pytest.mark.parametrize("kind", DATA)
def test_the_closed_forms_are_the_log_likelihoods_of_scipys_densities(kind):
    x = np.sort(DATA[kind])
    fitted = stats.pareto(*stats.pareto.fit(x, floc=0, fscale=x[0]))
    assert power_law(x, x[0]) == pytest.approx(fitted.logpdf(x).sum(), rel=1e-9)
    fitted = stats.expon(*stats.expon.fit(x))
    assert exponential(x, x[0]) == pytest.approx(fitted.logpdf(x).sum(), rel=1e-9)


def test_the_log_normal_is_the_best_that_is_truncated_below():
    """Twice the gain over the true parameters is a chi-squared of two degrees: 13.8 in 1,000."""
    mean, width, xmin = -1.0, 0.7, 0.3
    x = np.exp(np.random.default_rng(0).normal(mean, width, 4000))
    x = x[x >= xmin]
    law = stats.lognorm(width, scale=np.exp(mean))
    true = law.logpdf(x).sum() - len(x) * law.logsf(xmin)
    assert true <= log_normal(x, xmin) < true + 7


def test_a_tail_is_the_largest_share_of_the_positive_values():
    x = np.sort(DATA["power law"][:200])
    values = np.concatenate([np.zeros(50), -x, x[::-1]])
    for share, tail in ((1.0, x), (0.25, x[150:])):
        laws = {"exponential": exponential(tail, tail[0]), "log_normal": log_normal(tail, tail[0])}
        for against in (("exponential",), ("log_normal",), tuple(laws)):
            best = max(laws[name] for name in against)
            expected = (power_law(tail, tail[0]) - best) / len(tail)
            assert power_law_wins(values, against, share) == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(power_law_wins(x[:10], ("exponential",), 1.0))
    assert power_law_wins(x[:9], ("exponential",), 1.0) == -np.inf
