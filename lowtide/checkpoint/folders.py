"""Folders of results: written beside their place, renamed into it, and only ever in the place of an older result of ours."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowtide.errors import BadInput

MODEL_MARKS = ("model_index.json", "config.json")


@contextmanager
def written_beside(folder: Path, marks: tuple[str, ...] = MODEL_MARKS) -> Iterator[Path]:
    """A folder to write into that takes `folder`'s place when all went well, and vanishes when not."""
    folder = folder.absolute()
    check_place(folder, marks)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield fresh
        replace_folder(fresh, folder)
    except OSError as error:
        raise full_disk(folder) if error.errno == errno.ENOSPC else error from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_place(folder: Path, marks: tuple[str, ...] = MODEL_MARKS) -> None:
    """Only an older result of ours may be replaced."""
    if folder.is_file() or (
        folder.exists()
        and any(folder.iterdir())
        and not any((folder / mark).exists() for mark in marks)
    ):
        raise BadInput(
            f"found {folder.name} with other files in it",
            "a new folder or an older result",
            "choose another --out",
        )


def replace_folder(fresh: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}-old")
    if folder.exists():
        folder.rename(old)
    fresh.chmod(0o755)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def full_disk(folder: Path) -> BadInput:
    free = shutil.disk_usage(folder.parent).free
    return BadInput(
        f"found the disk full ({free:,} bytes left)",
        "room for the checkpoint",
        "free some space; nothing was changed",
    )
