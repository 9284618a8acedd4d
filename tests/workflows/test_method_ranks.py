"""Ranks of methods: no order where the seeds cannot tell, an order where they can."""

import numpy as np
import pytest

from lowtide.workflows import method_ranks
from lowtide.workflows.method_ranks import difference, ranks

MEASURES = ("step_error", "end_error", "psnr", "trajectory_error")


def cells(method: str, errors: list[float], code: str = "c0de", **others) -> list[dict]:
    """Cells of one method and width, one for each seed."""
    shared = {"width": "W4A8", "method": method, "bytes": 1000, "minutes": 1.0, "code": code}
    return [
        shared | dict.fromkeys(MEASURES, error) | {"seed": seed} | others
        for seed, error in enumerate(errors)
    ]


def test_a_difference_that_every_seed_has_holds_although_the_seeds_scatter():
    scattered = np.array([0.1, 0.4, 0.2, 0.3, 0.5])
    near = cells("near", list(scattered))
    far = cells("far", list(scattered + np.array([0.05, 0.06, 0.05, 0.04, 0.05])))
    low, high = difference(far, near, "step_error")
    # By hand: gaps of mean 0.05 and deviation 0.00707, over the root of 5, times t(99 %, 4).
    assert low == pytest.approx(0.05 - 4.60409 * 0.0070711 / 5**0.5, rel=1e-4)
    assert high == pytest.approx(0.05 + 4.60409 * 0.0070711 / 5**0.5, rel=1e-4)
    assert ranks({"near": near, "far": far}, "step_error") == {"near": 1, "far": 2}


def test_a_difference_inside_the_noise_is_no_order():
    groups = {
        "b": cells("b", [0.10, 0.12, 0.11]),
        "a": cells("a", [0.11, 0.11, 0.13]),
        "worst": cells("worst", [0.90, 0.92, 0.91]),
    }
    assert ranks(groups, "step_error") == {"b": 1, "a": 1, "worst": 3}
    lines = method_ranks.rows([*groups["b"], *groups["worst"], *groups["a"]])
    assert [line[1] for line in lines] == ["a", "b", "worst"], "equal ranks stand by name"
    assert [line[2] for line in lines] == ["1", "1", "3"]


def test_cells_of_other_code_or_too_few_seeds_are_not_compared():
    one = cells("one", [0.1, 0.2, 0.3])
    assert difference(one, cells("other", [0.4, 0.5]), "step_error") is None
    assert difference(one, cells("other", [0.4, 0.5, 0.6], code="old"), "step_error") is None
    groups = {"one": one, "old": cells("old", [0.4, 0.5, 0.6], code="old")}
    assert ranks(groups, "step_error") == {"one": None, "old": None}
    [old, first] = method_ranks.rows([*one, *groups["old"]])
    assert [old[1], old[2], first[1], first[2]] == ["old", "", "one", ""]


def test_identical_programs_share_a_rank():
    groups = {name: cells(name, [0.1, 0.2, 0.3]) for name in ("a", "b")}
    assert difference(groups["a"], groups["b"], "step_error") == (0, 0)
    assert ranks(groups, "step_error") == {"a": 1, "b": 1}


def test_the_figures_state_the_spread_and_leave_out_what_older_cells_lack():
    group = cells("a", [0.1, 0.3], steady_error=0.05)
    figures = dict(zip(method_ranks.FIGURES, method_ranks.figures(group), strict=True))
    assert figures["step error"] == "0.2000 ± 0.1414"
    assert figures["steady error"] == "0.0500 ± 0.0000"
    assert figures["temporal error"] == ""
    assert figures["bytes on disk"] == "1,000"
    group[0].pop("steady_error")
    assert method_ranks.figures(group)[6] == "", "the mean of a part of the seeds is no mean"
