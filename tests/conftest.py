"""Options of the suite."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowtide.kernels import race

# Without a CUDA card, Triton kernels run in the interpreter. triton reads this on import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native", help="test this build of the native kernels (see make sanitize)")


@pytest.fixture(scope="session", autouse=True)
def kernel_times(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The times of kernels go to a folder of this run, not to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "cache_folder", lambda: folder)
        yield folder
