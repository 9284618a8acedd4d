"""The short form of `make faults`: a few of each kind of fault, none of which gets through."""

import shutil

import pytest
import tiny_pipelines
from faulty import models, trials
from faulty.damage import WEIGHTS, Fault
from faulty.kills import Case, at_events, at_random, is_whole
from faulty.readers import read_while_written

import lowtide


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def packed(home):
    result = lowtide.quantize(tiny_pipelines.ddim(home), method="tfmq", **models.OPTIONS)
    return [result.save(home / "one"), models.in_several_files(result, home / "several")]


def test_no_damage_gets_through(packed, tmp_path):
    whole = trials.wholes(trials.attempt, packed)
    wrong: list[tuple] = []
    outcomes: set[str] = set()
    for number in range(40):
        model = packed[number // 2 % 2]
        copy = shutil.copytree(model, tmp_path / str(number))
        fault = trials.broken(copy, number, [other for other in packed if other != model])
        loader = trials.LOADERS[number // 4 % 2]
        answer = trials.attempt(copy, loader)
        outcome = trials.judged(answer, fault, whole[model, loader])
        outcomes.add(outcome)
        if outcome not in trials.GOOD:
            wrong.append((number, loader, fault, outcome, answer["said"]))
    assert wrong == []
    assert outcomes == {"refused", "same"}


def test_a_damage_that_gets_through_is_noticed(packed, tmp_path, monkeypatch):
    """Without the gate and the hashes, a bit of a scale draws other pictures."""
    whole = trials.wholes(trials.attempt, packed[:1])
    path = shutil.copytree(packed[0], tmp_path / "copy") / "unet" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(data)
    fault = Fault("flip", "a bit", (path.name,))
    monkeypatch.setattr(trials, "loads", lambda: {"lowtide": unchecked})
    answer = trials.attempt(tmp_path / "copy", "lowtide")
    assert trials.judged(answer, fault, whole[packed[0], "lowtide"]) == "other"


def unchecked(folder):
    return lowtide.load(folder, verify="off")


def saving(model):
    loaded = lowtide.load(model)
    return lambda place: lowtide.save(loaded, place)


def test_a_killed_save_leaves_the_old_model_or_the_new_one(packed, home, tmp_path):
    other = models.pair(home)[1]
    case = Case("save", saving(other), packed[0])
    found = [*at_events(case, tmp_path / "room", most=6), *at_random([case], 2, tmp_path / "room")]
    assert [kill for kill in found if not is_whole(kill)] == []
    assert len(found) == 8 and {"old"} <= {kill.left for kill in found}


def test_a_reader_beside_two_writers(home, tmp_path):
    pair = models.pair(home)
    found = read_while_written(pair, tmp_path / "room", 6)
    assert set(found) <= {"first", "second"} and found.total() == 6
