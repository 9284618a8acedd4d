"""The table of peers: which recipe it shows, how shares read, what a failed cell says."""

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import tiny_pipelines
from peers.cells import QUICK, ask_numbers, best, covered, numbers_of
from peers.lowtide import RECIPES, width
from peers.task import Bits, Task

from lowtide.formats import Affine, Mixed
from lowtide.nn.swap import packed_layers

PLACE = Path(__file__).parents[2] / "bench" / "peers.py"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_peers", PLACE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(recipe: str, psnr: float, low: float, **more: object) -> dict:
    share = {"weights": {"4": low, "32": 1 - low}, "inputs": {"8": low, "32": 1 - low}}
    speed = {"seconds_per_step": {"seconds": 0.1}, "float_seconds_per_step": {"seconds": 0.25}}
    named = {
        "peer": "quanto",
        "bits": "w4a8",
        "recipe": recipe,
        "psnr": psnr,
        "finite": True,
        "share": share,
    }
    return named | speed | {"bytes": 900_000, "left": ["a"], "layers": 3, "note": ""} | more


def test_the_recipe_that_quantizes_most_speaks() -> None:
    linears = cell("linears", 40, 0.15)
    everything = cell("all", 20, 1.0)
    worse = cell("other", 19, 0.998)
    assert best([linears, everything, worse]) is everything


def test_among_equals_the_nearest_speaks_and_a_failure_never() -> None:
    failed = {"recipe": "x", "bits": "w4a8", "cannot": "why"}
    broken = cell("nan", 90, 1.0, finite=False)
    assert best([failed, cell("a", 20, 0.999), cell("b", 21, 0.997), broken])["recipe"] == "b"


def test_inputs_count_only_where_they_were_asked_for() -> None:
    weights_only = cell("w", 20, 1.0) | {"share": {"weights": {"4": 1.0}, "inputs": {"32": 1.0}}}
    assert covered(weights_only) == 0.0
    assert covered(weights_only | {"bits": "w4a16"}) == 1.0


def test_channels_of_mixed_bits_count_as_their_average() -> None:
    assert [width(form) for form in (Mixed((3, 5, 4, 4), signed=False), Affine(4), None)] == [
        4,
        4,
        32,
    ]


def test_a_row_says_speed_size_shares_and_failures(peers: ModuleType) -> None:
    failed = {"recipe": "convolutions", "cannot": "only 2-d"}
    row = peers.line(cell("linears", 26.789, 0.25), [failed])
    assert row[2:7] == [
        "26.79",
        "0.100 (2.50x)",
        "0.90",
        "4: 25 %, float: 75 %",
        "8: 25 %, float: 75 %",
    ]
    assert row[7] == "1 of 3 layers' weights in float; convolutions: only 2-d"


def test_weights_kept_in_more_bits_are_named(peers: ModuleType) -> None:
    mixed = cell("compressed", 27, 1.0, left=[]) | {
        "share": {"weights": {"4": 0.15, "8": 0.85}, "inputs": {"8": 1.0}}
    }
    assert "85 % of weights in more bits than asked" in peers.line(mixed, [])[7]


def test_a_cell_that_cannot_gives_its_reason(peers: ModuleType) -> None:
    row = peers.line(
        {"peer": "quanto", "bits": "w3a16", "recipe": "default", "cannot": "no qint3"}, []
    )
    assert row == ["optimum-quanto", "default", "cannot", "", "", "", "", "no qint3"]


def numbers(*options: str) -> dict[str, int]:
    parser = argparse.ArgumentParser()
    ask_numbers(parser, {"seeds": 64, "images": 32, "steps": 50})
    return numbers_of(parser.parse_args(options), {"seeds": 64, "images": 32, "steps": 50})


def test_quick_fills_in_what_was_not_asked_for() -> None:
    assert numbers() == {"seeds": 64, "images": 32, "steps": 50}
    assert numbers("--quick", "--seeds", "32") == {
        "seeds": 32,
        "images": QUICK["images"],
        "steps": QUICK["steps"],
    }
    assert numbers("--steps", "0")["steps"] == 0


def test_numbers_that_are_no_multiple_of_the_batch_are_refused() -> None:
    with pytest.raises(SystemExit, match="found --images 20; expected a multiple of 16"):
        numbers("--images", "20")


def test_peers_that_do_not_run_keep_their_rows_of_the_same_weights(peers, tmp_path) -> None:
    out = tmp_path / "peers.json"
    result = {"model": "m", "numbers": {"steps": 2}, "float": {"fingerprint": "f"}}
    cells = [cell("all", 20, 1.0), cell("best", 30, 1.0, peer="lowtide")]
    assert peers.kept(out, result, ["lowtide"]) == []
    out.write_text(json.dumps(result | {"cells": cells}))
    older = peers.kept(out, result, ["lowtide"])
    assert [each["peer"] for each in older] == ["quanto"]
    fresh = cell("best", 31, 1.0, peer="lowtide")
    assert [each["peer"] for each in peers.in_order([*older, fresh])] == ["lowtide", "quanto"]
    assert peers.kept(out, result | {"float": {"fingerprint": "g"}}, ["lowtide"]) == []


@pytest.mark.parametrize("recipe", ["data-free", "data-free in groups of 16"])
def test_a_denoiser_is_packed_while_it_loads(recipe: str, tmp_path: Path) -> None:
    folder = tmp_path / "float"
    tiny_pipelines.ddim(tmp_path).save_pretrained(folder)
    task = Task(str(folder), Bits(4, 8), steps=2, images=2, iters=1, conditions={})
    names = task.inner  # a recipe replaces the float model
    packed = RECIPES[recipe].run(task)
    assert task.model is packed.model
    inner = [packed.held[name] for name in names]
    assert {(held.weights, held.inputs) for held in inner} == {(4, 8)}
    formats = [layer.format for _, layer in packed_layers(packed.model)]
    assert (16 in {form.group for form in formats}) == recipe.endswith("16")
    packed.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").exists()
