"""The rows that a temporal unit runs on when there are more than it runs at once."""

import itertools

import torch

from lowtide.stages.temporal_features import MOST_ROWS, bounded


def rows(steps: int, conditions: int) -> list[dict[str, torch.Tensor]]:
    """Rows in the order of calls: one step after the other, each with all its conditions."""
    pairs = itertools.product(range(steps), range(conditions))
    return [
        {"timestep": torch.tensor(step), "class_labels": torch.tensor(condition)}
        for step, condition in pairs
    ]


def test_a_bound_drops_no_condition_and_no_step():
    """Every fourth row of 50 steps with 32 conditions gives the same eight conditions each time."""
    many = rows(50, 32)
    kept = bounded(many, torch.Generator().manual_seed(0))
    assert len(kept) == MOST_ROWS
    assert {int(row["class_labels"]) for row in kept} == set(range(32))
    assert {int(row["timestep"]) for row in kept} == set(range(50))
    places = [many.index(row) for row in kept]
    assert places == sorted(set(places))


def test_few_rows_are_all_kept():
    few = rows(4, 5)
    assert bounded(few, torch.Generator()) is few
