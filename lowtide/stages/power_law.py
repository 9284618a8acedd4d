"""Log-likelihoods of a power law, an exponential and a log-normal for the tail of positive values.

Maximum likelihood on the values of at least `xmin` (Clauset, Shalizi and Newman, 2009). Each law
is a density on [xmin, inf), so that the three can be compared.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.stats import norm


def power_law(x: np.ndarray, xmin: float) -> float:
    """p(x) = (a - 1) / xmin (x / xmin)^-a, with a = 1 + n / sum ln(x / xmin)."""
    logs = np.log(x / xmin)
    a = 1 + len(x) / max(logs.sum(), 1e-12)
    return len(x) * (np.log(a - 1) - np.log(xmin)) - a * logs.sum()


def exponential(x: np.ndarray, xmin: float) -> float:
    """p(x) = l exp(-l (x - xmin)), with 1 / l the mean of x - xmin."""
    rate = 1 / max((x - xmin).mean(), 1e-12)
    return len(x) * np.log(rate) - rate * (x - xmin).sum()


def log_normal(x: np.ndarray, xmin: float) -> float:
    """The log-normal truncated below xmin; a search gives its mean and width."""
    logs = np.log(x)

    def loss(parameters: np.ndarray) -> float:
        mean = parameters[0]
        width = np.exp(parameters[1])
        density = norm.logpdf(logs, mean, width) - logs
        return -(density.sum() - len(x) * norm.logsf(np.log(xmin), mean, width))

    start = np.array([logs.mean(), np.log(max(logs.std(), 1e-6))])
    options = {"maxiter": 400, "xatol": 1e-4, "fatol": 1e-4}
    return -minimize(loss, start, method="Nelder-Mead", options=options).fun


ALTERNATIVES = {"exponential": exponential, "log_normal": log_normal}


def power_law_wins(values: np.ndarray, against: tuple[str, ...], share: float) -> float:
    """R = L(power law) - L(best alternative), per value; above 0 the power law wins.

    The likelihoods L are those of the largest `share` of the values.
    """
    x = np.sort(values[values > 0].astype(np.float64))
    x = x[int(len(x) * (1 - share)) :]
    if len(x) < 10 or x[0] == x[-1]:
        return -np.inf
    xmin = x[0]
    best = max(ALTERNATIVES[name](x, xmin) for name in against)
    return (power_law(x, xmin) - best) / len(x)
