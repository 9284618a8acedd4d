"""Kinds and bounds: what fits, what does not, and how it is said."""

from typing import Annotated

import numpy as np
import pytest

from lowtide.errors import BadInput
from lowtide.settings import Settings, settings_from
from lowtide.validation import Count, Positive, Share, Within, fits, words


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, int),
        (np.int64(3), Count),
        (3, float),
        (1.5, Positive),
        (True, bool),
        (None, Share | None),
        ((4, 8), tuple[Annotated[int, Within(2, 8)], ...]),
        ("x", str),
    ],
)
def test_what_fits(value, kind):
    assert fits(value, kind)


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (True, int, "a whole number"),
        (1.5, int, "a whole number"),
        ("1", float, "a number"),
        (float("nan"), Share, "a number from 0 to 1"),
        (0, Count, "a whole number at least 1"),
        (0.0, Positive, "a number above 0"),
        (2, Share | None, "a number from 0 to 1, or nothing"),
        ([4], tuple[int, ...], "a list, each a whole number"),
        (
            (4, 9),
            tuple[Annotated[int, Within(2, 8)], ...],
            "a list, each a whole number from 2 to 8",
        ),
        (1, bool, "true or false"),
    ],
)
def test_what_does_not(value, kind, said):
    assert not fits(value, kind)
    assert words(kind) == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"iters": "abc"},
            "found iters 'abc'; expected a whole number at least 1; correct iters",
        ),
        ({"iters": True}, "found iters True; expected a whole number"),
        ({"drop": 2}, "found drop 2; expected a number from 0 to 1, or nothing"),
        (
            {"labels": ["a"]},
            r"found labels \('a',\); expected a list, each a whole number at least 0",
        ),
        ({"prompts": "a cat"}, "found prompts 'a cat'; expected a list, each a text"),
        ({"weights": "4"}, "found weights '4'; expected 1 to 8, or 16 or 32"),
        ({"stages": 3}, "found stages 3; expected options by name"),
    ],
)
def test_a_setting_of_another_kind_is_one_sentence(options, said):
    with pytest.raises(BadInput, match=said):
        settings_from(options)


def test_lists_and_ranges_become_tuples():
    assert settings_from({"labels": range(3), "prompts": ["a", "b"]}) == Settings(
        labels=(0, 1, 2), prompts=("a", "b")
    )
