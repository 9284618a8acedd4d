"""The README's table: which cells it shows, what a row says, and how it replaces a model's part."""

import json
import sys

import numpy as np
import pytest
import table
from peers.cells import QUICK

FLOATING = {"bytes": 4_470_000, "weights": 1000, "in_ends": 10, "fingerprint": "abc"}


def cell(peer: str, recipe: str, psnr: float, low: float = 1.0, **more: object) -> dict:
    share = {"weights": {"4": low, "8": 1 - low}, "inputs": {"8": low, "32": 1 - low}}
    speed = {
        "seconds_per_step": {"seconds": 9.0, "processor_seconds": 0.1},
        "float_seconds_per_step": {"seconds": 9.0, "processor_seconds": 0.25},
    }
    named = {
        "peer": peer,
        "bits": "w4a8",
        "recipe": recipe,
        "psnr": psnr,
        "finite": True,
        "share": share,
        "versions": {},
    }
    return named | speed | {"bytes": 900_000, "note": ""} | more


def unable(peer: str, why: str, bits: str = "w4a4") -> dict:
    return {
        "peer": peer,
        "bits": bits,
        "recipe": "default",
        "cannot": why,
        "versions": {peer: "1.0"},
    }


def part(*cells: dict, model: str = "zoo:digits") -> dict:
    numbers = {"seeds": 64, "steps": 50, "images": 32, "iters": 1000}
    conditions = json.dumps({"prompts": ["a", "b"], "guidance": 4.0})
    return {
        "model": model,
        "conditions": conditions,
        "numbers": numbers,
        "float": FLOATING,
        "cells": list(cells),
    }


def test_the_best_psnr_of_those_that_do_what_was_asked() -> None:
    ours = [
        cell("lowtide", "tfmq", 30.0),
        cell("lowtide", "best", 31.5),
        cell("lowtide", "nan", 99.0, finite=False),
    ]
    peers = [
        cell("openvino", "compressed", 37.0, 0.15),
        cell("sdnq", "a", 26.0, 0.99),
        cell("sdnq", "b", 25.0),
    ]
    best, rival = table.chosen(part(*ours, *peers), "w4a8")
    assert (best["recipe"], rival["recipe"]) == ("best", "a")


def test_weights_in_more_bits_are_not_as_asked() -> None:
    assert table.as_asked(cell("openvino", "x", 37.0, 0.15)) == pytest.approx(0.15)
    assert (
        table.as_asked(
            cell("sdnq", "x", 1.0)
            | {"share": {"weights": {"0": 0.1, "4": 0.9}, "inputs": {"4": 1.0}}}
        )
        == 1.0
    )
    assert table.as_asked(unable("quanto", "no")) == 0.0


def test_inputs_in_float_are_as_asked_only_at_sixteen_bits() -> None:
    weights_only = cell("quanto", "x", 20.0) | {
        "share": {"weights": {"4": 1.0}, "inputs": {"32": 1.0}}
    }
    assert table.as_asked(weights_only) == 0.0
    assert table.as_asked(weights_only | {"bits": "w4a16"}) == 1.0


def test_the_ends_may_keep_eight_bits() -> None:
    kept = cell("sdnq", "x", 1.0, 0.975)
    assert table.fulfils(kept, FLOATING)
    assert not table.fulfils(kept, FLOATING | {"in_ends": 0})


def test_where_none_does_it_who_does_most_is_shown_and_says_so() -> None:
    halves = [
        cell("openvino", "compressed", 37.0, 0.15),
        cell("quanto", "default", 25.0, 0.5),
        unable("torchao", "no", "w4a8"),
    ]
    _, rival = table.chosen(part(*halves), "w4a8")
    assert rival["recipe"] == "default"
    assert (
        table.line(rival, FLOATING)[-1]
        == "only 50 % of the weights are in layers of W4A8; none does more"
    )


def test_a_row_gives_size_psnr_distance_and_processor_seconds() -> None:
    row = table.line(
        cell("lowtide", "best", 31.567, fd=1.23456, note="3 layers replaced"), FLOATING
    )
    assert row == [
        "**lowtide best**",
        "0.90",
        "31.57",
        "1.235",
        "0.100 (2.50x)",
        "3 layers replaced",
    ]


def test_where_no_peer_can_each_gives_its_reason() -> None:
    lines = table.rows(
        part(
            unable("quanto", "Unable: activations are qint8"),
            unable("torchao", "RuntimeError: int8"),
        )
    )
    assert lines[-1][1:3] == ["W4A4", "no peer"]
    assert lines[-1][-1] == "optimum-quanto: activations are qint8; torchao: RuntimeError: int8"


def test_the_float_model_comes_first_with_the_median_of_its_times() -> None:
    slow = {"float_seconds_per_step": {"processor_seconds": 0.35}}
    lines = table.rows(
        part(cell("lowtide", "a", 1.0), cell("lowtide", "b", 2.0), cell("sdnq", "c", 3.0) | slow)
    )
    assert lines[0] == ["zoo:digits", "float", "", "4.47", "", "0", "0.250", ""]
    assert [row[0] for row in lines[1:]] == [""] * 6


def test_the_page_says_how_many_images_and_keeps_its_columns() -> None:
    text = table.page(
        {"models": [part(cell("sdnq", "a|b", 20.0))], "refused": {"nncf==1": "no wheel"}}
    )
    assert (
        "N = 64 images of 50 steps, 2 prompts, guidance 4.0; calibrated on 32 trajectories" in text
    )
    assert "Could not be installed: nncf==1: no wheel" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(table.HEAD) + 1} and len(lines) == 2 + 7


def test_other_models_stay_in_the_table() -> None:
    old = {"models": [part(model="zoo:digits"), part(model="zoo:emoji")]}
    fresh = part(cell("sdnq", "a", 20.0), model="zoo:digits")
    result = table.merged(old, fresh, {}, ["sdnq"])
    assert [(each["model"], len(each["cells"])) for each in result["models"]] == [
        ("zoo:digits", 1),
        ("zoo:emoji", 0),
    ]


def test_peers_that_were_not_asked_for_stay_if_comparable() -> None:
    old = {"models": [part(cell("lowtide", "best", 20.0), cell("sdnq", "a", 21.0))]}
    fresh = part(cell("lowtide", "best", 30.0))
    whole = table.merged(old, fresh, {}, ["lowtide"])["models"][0]["cells"]
    assert [(each["peer"], each["psnr"]) for each in whole] == [("lowtide", 30.0), ("sdnq", 21.0)]
    retrained = fresh | {"float": FLOATING | {"fingerprint": "def"}}
    longer = fresh | {"numbers": fresh["numbers"] | {"iters": 2000}}
    for other in (retrained, longer):
        assert [
            each["peer"] for each in table.merged(old, other, {}, ["lowtide"])["models"][0]["cells"]
        ] == ["lowtide"]


def test_the_distance_is_that_of_the_cells_own_images(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features differ in their mean alone, so the distance is known."""
    images = {"float": 0.0, "lowtide/best": 3.0, "sdnq/a": 4.0}
    for folder, level in images.items():
        (tmp_path / folder).mkdir(parents=True)
        np.save(tmp_path / folder / "images.npy", level)
    spread = np.eye(4)
    monkeypatch.setattr(
        table,
        "statistics_of",
        lambda _, folder: table.Statistics.of(spread + np.load(folder / "images.npy")),
    )
    whole = part(
        cell("lowtide", "best", 30.0, folder="lowtide/best"),
        cell("sdnq", "a", 20.0, folder="sdnq/a"),
    )
    table.judged(whole, tmp_path, None)
    assert [each["fd"] for each in whole["cells"]] == pytest.approx([4 * 9.0, 4 * 16.0])


def benches(monkeypatch: pytest.MonkeyPatch, *options: str) -> list[table.Bench]:
    monkeypatch.setattr(sys, "argv", ["table.py", *options])
    with table.bar(1) as shown:
        return list(table.benches(table.arguments(), {}, shown))


def test_quick_numbers_give_way_to_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    digits, emoji = benches(
        monkeypatch, "--models", "zoo:digits,zoo:emoji", "--quick", "--iters", "7"
    )
    assert digits.numbers == QUICK | {"iters": 7}
    assert digits.conditions == "{}" and json.loads(emoji.conditions)["guidance"] == 4.0
    assert digits.home != emoji.home


def test_conditions_of_a_model_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    [dit] = benches(
        monkeypatch, "--models", "zoo:dit", "--conditions", '{"zoo:dit": {"labels": [3]}}'
    )
    assert json.loads(dit.conditions) == {"labels": [3]}


def test_the_bar_counts_what_has_ended_and_catches_up_with_what_never_began() -> None:
    with table.bar(20) as shown:
        for name in ("quanto w8a8 default", "lowtide w8a8 best", "lowtide w4a8 best"):
            shown.say(name)
        assert shown.progress.tasks[0].completed == 1 + table.LONGER
        shown.upto(20)
        assert shown.progress.tasks[0].completed == 20


def test_the_readme_holds_the_table_between_its_marks(tmp_path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    result = {"models": [part(cell("sdnq", "a", 20.0))], "refused": {}}
    table.put_in_readme(result, readme)
    table.put_in_readme(result, readme)
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1], lines.count(table.BEGIN), "old" in lines) == (
        "before",
        "after",
        1,
        False,
    )
    assert lines[2:-2] == table.condensed(result)
    assert all(line.count("|") == len(table.HEAD) for line in table.condensed(result))


def test_the_readme_of_this_repository_shows_the_committed_table() -> None:
    result = json.loads(table.OUT.read_text())
    assert "\n".join(table.condensed(result)) in (table.ROOT / "docs/measured.md").read_text()
