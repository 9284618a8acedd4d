"""Locks of a folder while entries in it are renamed, and while one of them is read.

Some network file systems cannot lock a folder. There, nobody waits.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def alone_in(parent: Path) -> Iterator[None]:
    """For the moment that renaming takes, no other process renames or reads in this folder."""
    with _locked(parent, fcntl.LOCK_EX):
        yield


@contextmanager
def reading_in(parent: Path) -> Iterator[None]:
    """While an entry of this folder is read, it is not replaced. Readers share the folder."""
    with _locked(parent, fcntl.LOCK_SH):
        yield


@contextmanager
def _locked(parent: Path, kind: int) -> Iterator[None]:
    handle = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, kind)
        yield
    finally:
        os.close(handle)
