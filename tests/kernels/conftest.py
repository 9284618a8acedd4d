"""`machine`: the native kernels on every instruction set, with one and two threads."""

import ctypes
from itertools import product
from pathlib import Path

import pytest
from native_programs import Machine

from lowtide.kernels import native_library
from lowtide.kernels.native_library import SETS, Native

THREADS = (1, 2)


def library(config: pytest.Config) -> Native:
    path = config.getoption("--native")
    return native_library.load(Path(path)) if path else native_library.native()


@pytest.fixture
def native(pytestconfig: pytest.Config) -> Native:
    """The library under test; without one, the test is skipped."""
    found = library(pytestconfig)
    if found.library is None:
        pytest.skip(found.reason)
    return found


@pytest.fixture
def forced(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine that runs what lowtide's own functions call."""

    def run_one(native: Native, arguments: ctypes.Structure, threads: int) -> None:
        assert machine.run(arguments) == 0

    monkeypatch.setattr(native_library, "native", lambda: machine.native)
    monkeypatch.setattr(Native, "run_one", run_one)
    return machine


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "machine" not in metafunc.fixturenames:
        return
    found = library(metafunc.config)
    assert found.library or not metafunc.config.getoption("--native"), found.reason
    machines = [
        Machine(found, SETS[name], threads)
        for name, threads in product(found.instruction_sets(), THREADS)
    ]
    metafunc.parametrize("machine", machines, ids=str)
