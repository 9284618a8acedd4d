"""The race: the winner of made-up times, and the file that keeps them."""

import json
import os
import warnings
from pathlib import Path

import pytest

from lowtide.kernels import race
from lowtide.kernels.race import NATIVE, ONEDNN, Races, Times, best_times, saved_races

# tests/conftest.py replaces it while tests run.
_cache_folder = race.cache_folder


class Clock:
    """Time that only engines spend."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def engine(self, name: str, *seconds: float):
        """An engine whose runs take these times, the last one again and again."""
        waiting = list(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += waiting.pop(0) if len(waiting) > 1 else waiting[0]

        return run


def test_the_best_time_of_each_engine_counts_but_not_its_first():
    clock = Clock()
    native = clock.engine("native", 0.0001, 0.004, 0.003, 0.005)
    other = clock.engine("onednn", 9.0, 0.002, 0.006)
    assert best_times(native, other, 0.02, clock) == Times(native=3000.0, onednn=2000.0)


def test_the_engines_run_in_turns_and_no_longer_than_asked():
    clock = Clock()
    best_times(clock.engine("native", 0.001), clock.engine("onednn", 0.001), 0.0095, clock)
    assert clock.order == ["native", "onednn"] * 6


def test_a_slow_shape_has_two_rounds():
    clock = Clock()
    best_times(clock.engine("native", 1.0), clock.engine("onednn", 1.0), 0.01, clock)
    assert clock.order == ["native", "onednn"] * 3


@pytest.mark.parametrize(
    ("native", "keeps_bits", "winner", "reason"),
    [
        (130.0, False, ONEDNN, "1.3 x as fast in the race"),
        (130.0, True, ONEDNN, "1.3 x as fast in the race"),
        (108.0, False, ONEDNN, "1.1 x as fast in the race"),
        (108.0, True, NATIVE, "oneDNN won the race by 8 % only"),
        (102.0, False, NATIVE, "oneDNN won the race by 2 % only"),
        (50.0, False, NATIVE, "2.0 x as fast in the race"),
    ],
)
def test_the_winner_and_the_reason(native, keeps_bits, winner, reason):
    times = Times(native, 100.0)
    assert times.winner(keeps_bits=keeps_bits) == winner
    assert times.reason(winner) == reason


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache" / "lowtide"
    monkeypatch.setattr(race, "cache_folder", lambda: folder)
    return folder


def save_one(shape: str = "a shape") -> Races:
    races = saved_races()
    races.add(shape, Times(3.0, 2.0))
    races.save()
    return races


def sentences(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(each.message) for each in caught]


def test_times_are_known_to_the_next_process(folder):
    assert saved_races().known == {}
    save_one()
    assert saved_races().known == {"a shape": Times(3.0, 2.0)}
    [path] = folder.iterdir()
    assert json.loads(path.read_text())["machine"]["torch"]


def test_nothing_new_writes_nothing(folder):
    saved_races().save()
    assert not folder.exists()


def test_two_processes_keep_what_both_have_raced(folder):
    first = saved_races()
    save_one("of another process")
    first.add("mine", Times(1.0, 1.0))
    first.save()
    assert set(saved_races().known) == {"of another process", "mine"}


@pytest.mark.parametrize("part", ["cpu", "torch", "library"])
def test_times_of_another_machine_do_not_count(folder, monkeypatch, part):
    save_one()
    machine = race.this_machine() | {part: "another"}
    monkeypatch.setattr(race, "this_machine", lambda: machine)
    assert saved_races().known == {}


def test_times_of_another_machine_under_this_name_do_not_count(folder):
    path = save_one().path
    content = json.loads(path.read_text())
    content["machine"]["torch"] = "another"
    path.write_text(json.dumps(content))
    assert saved_races().known == {}


BROKEN = [
    "",
    "{",
    "[]",
    "null",
    '{"machine": 3}',
    '{"machine": MACHINE, "times": {"a": {"native": 1}}}',
    '{"machine": MACHINE, "times": {"a": {"native": "x", "onednn": 1}}}',
    '{"machine": MACHINE, "times": {"a": {"native": -1, "onednn": 1}}}',
    '{"machine": MACHINE, "times": {"a": {"native": NaN, "onednn": 1}}}',
    '{"machine": MACHINE, "times": []}',
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_costs_one_sentence_at_most(folder, content):
    path = save_one().path
    path.write_text(content.replace("MACHINE", json.dumps(race.this_machine())))
    found: list[Races] = []
    told = sentences(lambda: found.append(saved_races()))
    assert found[0].known == {}
    assert len(told) == (content != '{"machine": 3}')
    sentences(save_one)
    assert saved_races().known == {"a shape": Times(3.0, 2.0)}


def test_bytes_that_are_no_text_cost_one_sentence(folder):
    save_one().path.write_bytes(b"\xff\xfe\x00")
    assert "times its kernels again" in sentences(saved_races)[0]


def test_a_folder_that_cannot_be_made_costs_one_sentence(folder):
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file in the place of the folder")
    told = sentences(save_one)
    assert len(told) == 1
    assert told[0].startswith("lowtide cannot keep the times of its kernels in ")


def test_a_write_that_fails_leaves_the_old_file_alone(folder, monkeypatch):
    path = save_one().path
    before = path.read_text()

    def refuse(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    [sentence] = sentences(lambda: save_one("another"))
    assert "No space left on device" in sentence
    assert path.read_text() == before
    assert list(folder.iterdir()) == [path]


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = _cache_folder()
    assert folder == tmp_path / "lowtide"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert _cache_folder() == Path.home() / ".cache" / "lowtide"
