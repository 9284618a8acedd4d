"""Options of the suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native", help="test this build of the native kernels (see make sanitize)")
