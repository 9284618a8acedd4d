"""The race of tiles: the fastest likely tile runs from then on, and no bit depends on who wins."""

import pytest
import torch
from triton_layers import DEVICE, FORMATS, SCALES, STEP, ZEROS, random_layer

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.errors import OutOfResources

from lowtide.kernels.triton import product_launches, tile_race
from lowtide.kernels.triton.operands import Epilogue, StepTable
from lowtide.kernels.triton.product_launches import multiply, multiply_to_codes
from lowtide.kernels.triton.resident import resident_weight
from lowtide.kernels.triton.rounding_launches import round_tokens
from lowtide.kernels.triton.tile_race import TileRaces
from lowtide.kernels.triton.tiles import CARDS, Shape, choose, likely

SHAPE = Shape(rows=8192, columns=1280, k=1280, run=64, step=1280, most=256 * 128)
HOPPER = (9, 0)


@pytest.fixture
def hopper(monkeypatch):
    """Races are held, as on an H100."""
    monkeypatch.setattr(tile_race, "may_race", lambda x: True)


def held(seconds, calls=None) -> TileRaces:
    """Races in which the launch of each choice takes these seconds, by its place."""
    candidates = likely(HOPPER, SHAPE)
    running: list = []

    def stopwatch(launch):
        launch()
        return seconds[candidates.index(running[-1])]

    def launch(choice):
        running.append(choice)
        if calls is not None:
            calls.append(choice)

    races = TileRaces(stopwatch)
    races.choice(torch.empty(0), HOPPER, SHAPE, launch)
    return races


def test_the_fastest_of_the_likely_tiles_wins_and_is_not_raced_again(hopper):
    calls: list = []
    candidates = likely(HOPPER, SHAPE)
    assert len(candidates) > 2
    races = held([3.0, 2.0, 1.0, 4.0], calls)
    assert calls == list(candidates)
    assert races.winners == {(HOPPER, SHAPE): candidates[2]}
    assert races.choice(torch.empty(0), HOPPER, SHAPE, calls.append) == candidates[2]
    assert len(calls) == len(candidates)


def test_a_tile_that_does_not_fit_on_the_card_loses(hopper):
    candidates = likely(HOPPER, SHAPE)

    def launch(choice):
        if choice != candidates[1]:
            raise OutOfResources(300_000, 232_448, "shared memory")

    races = TileRaces(lambda run: run() or 1.0)
    assert races.choice(torch.empty(0), HOPPER, SHAPE, launch) == candidates[1]


def test_without_a_race_the_reckoned_tile_runs():
    def launch(choice):
        raise AssertionError("a launch where no race may be held")

    races = TileRaces()
    x = torch.empty(0, device=DEVICE)
    assert races.choice(x, HOPPER, SHAPE, launch) == choose(HOPPER, SHAPE)
    assert not races.winners


@pytest.mark.parametrize("capability", CARDS)
def test_the_likeliest_comes_first_and_others_are_near(capability):
    shape = Shape(300, 640, 1152, 64, 128, 256 * 128)
    ranked = likely(capability, shape)
    assert ranked[0] == choose(capability, shape)
    assert len(set(ranked)) == len(ranked) <= 4


@pytest.mark.parametrize("to_codes", [False, True])
def test_a_race_stores_beside_the_output(monkeypatch, to_codes):
    """Sums of codes are added to what lies there: a race on the output would count them twice."""
    torch.manual_seed(0)
    layer = random_layer(FORMATS[0], 21, 70)
    weight = resident_weight(layer.packed, layer.grid, layer.spec, 70, 1)
    running = torch.as_tensor(STEP, device=DEVICE)
    table = StepTable(SCALES.to(DEVICE), ZEROS.to(DEVICE), running, 255, None)
    codes = round_tokens(torch.randn(3, 7, 70, device=DEVICE), table, weight.room)

    def product() -> list[torch.Tensor]:
        if to_codes:
            rounded = multiply_to_codes(codes, weight, Epilogue(layer.bias), table, 32)
            return [rounded.data, rounded.sums]
        return [multiply(codes, weight, Epilogue(layer.bias), torch.float32)]

    expected = product()
    launches = []

    def stopwatch(launch):
        launch()
        launches.append(launch)
        return 1.0 / len(launches)  # the last one wins

    monkeypatch.setattr(tile_race, "may_race", lambda x: True)
    monkeypatch.setattr(product_launches, "RACES", TileRaces(stopwatch))
    found = product()
    assert len(launches) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
