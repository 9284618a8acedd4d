"""Exchange two entries of a folder in one step, where the system offers it.

Readers then find the old result or the new one at every moment, never nothing.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # of Linux
_RENAME_SWAP = 2  # of macOS


def exchanged(first: Path, second: Path) -> bool:
    """Give each entry the other's name; False, and nothing done, if the system cannot."""
    swap = _system_call()
    return swap is not None and swap(os.fsencode(first), os.fsencode(second)) == 0


@cache
def _system_call() -> Callable[[bytes, bytes], int] | None:
    """The C library's function; it answers 0 if it has exchanged the two."""
    library = ctypes.CDLL(None)
    try:
        if sys.platform == "darwin":
            swap = library.renamex_np
            return lambda first, second: swap(first, second, _RENAME_SWAP)
        rename = library.renameat2
    except AttributeError:
        return None
    return lambda first, second: rename(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
