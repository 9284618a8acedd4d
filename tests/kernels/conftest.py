"""`machine`: the native kernels on every instruction set, with one and two threads."""

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
