"""Folders of results: written beside their place, renamed into it, never over other files.

A folder that lowtide wrote holds `lowtide-files.json`, the list of its files. A new result of the
same kind may replace it as long as it holds nothing else. An evidence folder with a list of its own
may stand inside a model's folder. The parent of a place called NAME can hold:

    NAME               the result, complete
    .NAME-XXXXXXXX     a result that is being written; a lock in it is held until it is complete.
                       Without a lock it is the replaced result, just before it is renamed
    .NAME-old          the replaced result, for as long as its removal takes
    NAME.run           finished parts of an unfinished command (stages/finished_work.py)

A process that is killed leaves the second or the third. The next use of the place tidies up: an
abandoned folder is removed, and an old result goes back if nothing stands in its place.
"""

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lowtide.checkpoint.exchange import exchanged
from lowtide.checkpoint.folder_locks import alone_in
from lowtide.checkpoint.manifest import MANIFEST, add_listed, listed, write_manifest
from lowtide.errors import BadInput
from lowtide.stages.finished_work import holds_runs_alone

LOCK = ".lowtide-lock"
# The kinds of results: a folder is of a kind if its list names one of these files.
MODEL_MARKS = ("model_index.json", "config.json")
IMAGE_MARKS = ("grid.png",)
EVIDENCE_MARKS = ("evidence.json",)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def written_beside(
    folder: Path, marks: tuple[str, ...] = MODEL_MARKS, source: Path | None = None
) -> Iterator[Path]:
    """A folder to write into. It takes `folder`'s place if all goes well, and vanishes if not.

    One sentence on stderr says if there is an earlier result, which it will replace.
    """
    place = check_place(folder, marks, source)
    if place.is_dir() and any(place.iterdir()):
        print(f"{folder} holds an earlier result; the new one replaces all of it.", file=sys.stderr)
    with _parents(place):
        fresh = place.with_name(f".{place.name}-{secrets.token_hex(4)}")
        lock = FileLock(fresh / LOCK, timeout=10)
        try:
            with alone_in(place.parent):
                _check_no_writer(place)
                fresh.mkdir()
                lock.acquire()
            yield fresh
            write_manifest(fresh, _files(fresh))
            _share(fresh)
            _replace(fresh, place, marks)
        except OSError as error:
            if error.errno in _FULL:
                raise full_disk(place) from error
            raise
        finally:
            lock.release()
            shutil.rmtree(fresh, ignore_errors=True)


def check_place(
    folder: Path, marks: tuple[str, ...] = MODEL_MARKS, source: Path | None = None
) -> Path:
    """The absolute path of a place that can hold a new result, or one sentence on why it cannot.

    `source`: the folder of the model that the result is made from, which must not be touched.
    """
    with _one_sentence(folder):
        if folder.name in ("", ".."):
            raise BadInput(
                f"found {folder} as the place", "a folder's name", "choose another --out"
            )
        place = folder.parent.resolve() / folder.name
        _check_entry(place)
        if source is not None:
            _check_source(place, source.resolve())
        recover(place, marks)
        _check_contents(place, marks)
        _check_writable(place)
    return place


@contextmanager
def _one_sentence(folder: Path) -> Iterator[None]:
    """Errors of the file system, such as a name that is too long, as a BadInput."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if getattr(error, "errno", None) in _FULL:
            raise full_disk(folder.absolute()) from error
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"found that {folder} cannot be written ({reason})",
            "a folder in which files can be made",
            "choose another --out",
        ) from error


def _check_entry(place: Path) -> None:
    """A folder, or nothing at all."""
    kind = None
    if place.is_symlink():
        kind = "a symbolic link"
    elif place.is_mount():
        kind = "a mount point"
    elif os.path.lexists(place) and not place.is_dir():
        kind = "a file"
    if kind:
        raise BadInput(
            f"found {kind} at {place}", "a new folder or an older result", "choose another --out"
        )


def _check_source(place: Path, source: Path) -> None:
    """Neither the folder of the source, nor one inside it, nor one around it."""
    relation = None
    if place == source:
        relation = "is the source itself"
    elif source in place.parents:
        relation = "lies inside the source"
    elif place in source.parents:
        relation = "contains the source"
    if relation:
        raise BadInput(
            f"found that {place} {relation}", "a folder apart from it", "choose another --out"
        )


def _check_contents(place: Path, marks: tuple[str, ...]) -> None:
    """Only an older result of the same kind may be replaced."""
    if not place.is_dir() or not any(place.iterdir()):
        return
    names = listed(place)
    expected = "a new folder, or an older result with nothing else in it"
    if foreign := next(_foreign(place, _paths(place, names)), None):
        raise BadInput(
            f"found other files in {place.name} (first: {foreign.relative_to(place)}), "
            "which lowtide did not write",
            expected,
            "choose another --out, or move them away",
        )
    if not names.intersection(marks):
        raise BadInput(
            f"found a result of another kind in {place.name} (no {marks[0]})",
            expected,
            "choose another --out",
        )


def _check_writable(place: Path) -> None:
    """A folder can be made and removed beside the place, and files inside it."""
    probe = place.with_name(f".{place.name}-{secrets.token_hex(4)}")  # swept if a kill leaves it
    with _parents(place):
        probe.mkdir()
        with suppress(FileNotFoundError):  # another command may have swept it
            probe.rmdir()
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def _parents(place: Path) -> Iterator[None]:
    """Make the folders above the place. Those that are new are removed if they stay empty."""
    missing = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


def recover(folder: Path, marks: tuple[str, ...] = MODEL_MARKS) -> None:
    """Tidy up beside a place after a process was killed. What lowtide did not write stays."""
    place = folder.absolute()
    if not place.parent.is_dir():
        return
    with alone_in(place.parent):
        _check_no_writer(place)
        for fresh in _beside(place, "[0-9a-f]{8}"):
            if _abandoned(fresh):
                shutil.rmtree(fresh)
            elif not (fresh / LOCK).exists():
                _settle(fresh, place, marks)
        for old in _beside(place, r"old\d*"):
            _settle(old, place, marks)


def recover_missing(source: str | Path) -> None:
    """Put a model back that a kill moved aside, if nothing stands at the folder `source`.

    Commands that read a model call this first. A hub id and zoo:NAME are no folders.
    """
    if not str(source).startswith("zoo:") and not Path(source).exists():
        recover(Path(source))


def _check_no_writer(place: Path) -> None:
    """No other process writes this place now."""
    for fresh in _beside(place, "[0-9a-f]{8}"):
        if (fresh / LOCK).exists() and not _abandoned(fresh):
            raise BadInput(
                f"found another lowtide that writes {place.name}",
                "one at a time",
                "wait for it, or choose another --out",
            )


def _beside(place: Path, suffix: str) -> list[Path]:
    """The folders .NAME-SUFFIX beside a place."""
    pattern = re.compile(rf"\.{re.escape(place.name)}-{suffix}")
    entries = [path for path in place.parent.iterdir() if pattern.fullmatch(path.name)]
    return sorted(path for path in entries if path.is_dir() and not path.is_symlink())


def _abandoned(fresh: Path) -> bool:
    """Whether a process wrote into this folder and ended before the folder was complete."""
    if not (fresh / LOCK).exists():
        return False
    try:
        with FileLock(fresh / LOCK, timeout=0):
            return True
    except Timeout:
        return False


def _settle(old: Path, place: Path, marks: tuple[str, ...]) -> None:
    """Put an old result back if nothing stands in its place; remove it if a result stands there."""
    names = listed(old)
    paths = _paths(old, names)
    ours = names.intersection(marks) and next(_foreign(old, paths), None) is None
    vacant = not os.path.lexists(place)
    if ours and vacant and all(path.is_file() for path in paths):
        old.rename(place)
    elif ours and (vacant or listed(place).intersection(marks)):
        _remove(old)
    elif not any(old.iterdir()):
        old.rmdir()


def _replace(fresh: Path, place: Path, marks: tuple[str, ...]) -> None:
    """Rename the fresh folder into its place. The contents of the place are checked again first."""
    with alone_in(place.parent):
        _check_contents(place, marks)
        old = _free_name(place)
        if place.exists() and exchanged(fresh, place):
            fresh.rename(old)
        else:
            _rename_twice(fresh, place, old)
        (place / LOCK).unlink(missing_ok=True)
        _remove(old)


def _rename_twice(fresh: Path, place: Path, old: Path) -> None:
    """Where the system cannot exchange: for a moment nothing stands at the place."""
    if place.exists():
        place.rename(old)
    try:
        fresh.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise


def _free_name(place: Path) -> Path:
    """.NAME-old, or .NAME-old1 if somebody else's folder has that name."""
    numbers = ["", *range(1, 1000)]
    names = (place.with_name(f".{place.name}-old{number}") for number in numbers)
    return next(name for name in names if not os.path.lexists(name))


def _remove(folder: Path) -> None:
    """Remove a result, its list of files last: what a kill leaves is known by its list.

    A file that cannot be removed is no reason to fail: the new result stands.
    """
    with suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.rmdir()


def _files(folder: Path) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return [path.relative_to(folder).as_posix() for path in paths]


def _paths(folder: Path, names: frozenset[str]) -> frozenset[Path]:
    return frozenset(folder / name for name in names)


def _foreign(folder: Path, ours: frozenset[Path]) -> Iterator[Path]:
    """Files in a folder that lowtide did not write, in order of their names."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir():
            if path not in ours and path.name != LOCK:
                yield path
        elif not _abandoned(path) and not holds_runs_alone(path):
            yield from _foreign(path, ours | _nested(path))


def _nested(folder: Path) -> frozenset[Path]:
    """The files of an evidence folder inside a model's folder."""
    names = listed(folder)
    return _paths(folder, names) if names.intersection(EVIDENCE_MARKS) else frozenset()


def _share(folder: Path) -> None:
    """Give every file the permissions of a new file: safetensors lets nobody but the owner read."""
    mode = (folder / MANIFEST).stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def check_file(path: Path) -> None:
    """A single file may be written in a folder of other files: its name is free or lowtide's."""
    if os.path.lexists(path) and path.name not in listed(path.parent):
        raise BadInput(
            f"found a file at {path}, which lowtide did not write",
            "a free name",
            "move it away, or choose another --out",
        )


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """A path to write to. The file takes `path`'s place if all goes well; its folder lists it."""
    check_file(path)
    fresh = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        yield fresh
        add_listed(path.parent, path.name, fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def full_disk(folder: Path) -> BadInput:
    home = next(parent for parent in folder.parents if parent.exists())
    return BadInput(
        f"found the disk full ({shutil.disk_usage(home).free:,} bytes left)",
        "room for the result",
        "free some space; nothing was changed",
    )
