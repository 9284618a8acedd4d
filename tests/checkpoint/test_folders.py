"""Folders of results: other files survive, refusals come before any work, a kill loses nothing."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from lowtide.checkpoint import folders
from lowtide.checkpoint.exchange import exchanged
from lowtide.checkpoint.manifest import MANIFEST
from lowtide.errors import BadInput

FILES = {"model_index.json": "{}", "unet/config.json": "{}", "unet/weights.safetensors": "codes"}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write(place: Path, text: str = "codes", marks: tuple[str, ...] = folders.MODEL_MARKS) -> Path:
    """A small result at the place."""
    with folders.written_beside(place, marks) as fresh:
        fill(fresh, {marks[0]: "{}", "unet/weights.safetensors": text})
    return place


def weights(place: Path) -> str:
    return (place / "unet" / "weights.safetensors").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@contextmanager
def refused(folder: Path, match: str):
    """One sentence, before the body of the `with` statement runs, and every file as it was."""
    before = tree(folder)
    with pytest.raises(BadInput, match=match):
        yield
    assert tree(folder) == before


def work(place: Path, marks=folders.MODEL_MARKS, source: Path | None = None) -> None:
    with folders.written_beside(place, marks, source):
        pytest.fail("the work began")


def test_a_new_folder_and_its_list(tmp_path):
    place = write(tmp_path / "a" / "b")
    listed = json.loads((place / MANIFEST).read_text())["files"]
    assert list(listed) == ["model_index.json", "unet/weights.safetensors"]
    assert names(place) == [MANIFEST, "model_index.json", "unet"]
    assert names(place.parent) == ["b"]


def test_an_older_result_is_replaced(tmp_path):
    write(tmp_path / "x", "old")
    write(tmp_path / "x", "new")
    assert weights(tmp_path / "x") == "new"
    assert names(tmp_path) == ["x"]


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "x").mkdir()
    assert weights(write(tmp_path / "x")) == "codes"


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "ten years of work"},
        {"config.json": "{}", "thesis.txt": "ten years of work"},
        {"model_index.json": "{}"},
        {"grid.png": "", "evidence.json": "{}"},
        {"lowtide.json": "{}", "unet/config.json": '{"quantization_config": {}}'},
        {MANIFEST: '{"files": ["model_index.json"]', "model_index.json": "{}"},
        {MANIFEST: '{"files": 3}', "model_index.json": "{}"},
        {MANIFEST: "[]", "model_index.json": "{}"},
    ],
)
def test_a_folder_that_lowtide_did_not_write(tmp_path, files):
    fill(tmp_path / "x", files)
    for marks in (folders.MODEL_MARKS, folders.IMAGE_MARKS, folders.EVIDENCE_MARKS):
        with refused(tmp_path, "other files in x"):
            work(tmp_path / "x", marks)


@pytest.mark.parametrize("name", ["thesis.txt", "unet/thesis.txt", "notes/a/thesis.txt"])
def test_a_result_with_one_more_file(tmp_path, name):
    fill(write(tmp_path / "x"), {name: "ten years of work"})
    with refused(tmp_path, rf"\(first: {name}\), which lowtide did not write; expected a new"):
        work(tmp_path / "x")


def test_a_link_inside_a_result(tmp_path):
    (tmp_path / "thesis").mkdir()
    fill(tmp_path / "thesis", {"thesis.txt": "ten years of work"})
    (write(tmp_path / "x") / "link").symlink_to(tmp_path / "thesis")
    with refused(tmp_path, "first: link"):
        work(tmp_path / "x")


def test_a_file_that_arrives_during_the_work_survives(tmp_path):
    write(tmp_path / "x", "old")
    writing = folders.written_beside(tmp_path / "x")
    with pytest.raises(BadInput, match=r"first: thesis\.txt"), writing as fresh:
        fill(fresh, FILES)
        fill(tmp_path / "x", {"thesis.txt": "ten years of work"})
    assert weights(tmp_path / "x") == "old"
    assert (tmp_path / "x" / "thesis.txt").read_text() == "ten years of work"
    assert names(tmp_path) == ["x"]


def test_results_of_another_kind(tmp_path):
    kinds = (folders.MODEL_MARKS, folders.IMAGE_MARKS, folders.EVIDENCE_MARKS)
    for kind in kinds:
        write(tmp_path / "x", marks=kind)
        for other in set(kinds) - {kind}:
            with refused(tmp_path, "another kind"):
                work(tmp_path / "x", other)
        folders._remove(tmp_path / "x")


def test_evidence_inside_a_model_goes_with_it(tmp_path):
    place = write(tmp_path / "x")
    write(place / "evidence", marks=folders.EVIDENCE_MARKS)
    write(place, "new")
    assert weights(place) == "new" and not (place / "evidence").exists()
    write(place / "evidence", marks=folders.EVIDENCE_MARKS)
    fill(place, {"evidence/thesis.txt": "ten years of work"})
    with refused(tmp_path, "first: evidence/thesis.txt"):
        work(place)


def test_a_model_inside_a_model_stays(tmp_path):
    write(write(tmp_path / "x") / "other")
    with refused(tmp_path, "first: other/"):
        work(tmp_path / "x")


def test_a_folder_of_models_stays(tmp_path):
    write(tmp_path / "models" / "x")
    with refused(tmp_path, "first: x/"):
        work(tmp_path / "models")


def test_the_source_is_out_of_reach(tmp_path):
    source = write(tmp_path / "home" / "model")
    (tmp_path / "link").symlink_to(source.parent)
    for place, words in (
        (source, "is the source itself"),
        (tmp_path / "link" / "model", "is the source itself"),
        (source / "packed", "lies inside the source"),
        (source / "a" / "b", "lies inside the source"),
        (tmp_path / "home", "contains the source"),
    ):
        with refused(tmp_path, f"{words}; expected a folder apart from it"):
            work(place, source=source)
    with refused(tmp_path, "is the source itself"):
        work(source, source=tmp_path / "link" / "model")


def test_what_is_no_folder(tmp_path):
    target = write(tmp_path / "x")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("text")
    for name, words in (("link", "symbolic link"), ("dangling", "symbolic link"), ("file", "file")):
        with refused(tmp_path, f"found a {words} at"):
            work(tmp_path / name)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()


@pytest.mark.parametrize(
    "place", ["file/x", "file/x/y", "n" * 300, "n" * 250, "/proc/x", ".", "..", "/", "new/..", ""]
)
def test_places_that_cannot_be_written(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    with refused(tmp_path, "found .*; expected .*; choose another --out"):
        work(Path(place))
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_places_without_permission(tmp_path):
    write(tmp_path / "closed" / "x")
    for folder in (tmp_path / "closed", tmp_path / "closed" / "x"):
        folder.chmod(0o500)
        try:
            with refused(tmp_path, "cannot be written"):
                work(tmp_path / "closed" / "x")
        finally:
            folder.chmod(0o700)


def test_a_way_round_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("new/../x"))
    write(Path("y/"))
    assert names(tmp_path) == ["x", "y"]


def test_work_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), folders.written_beside(tmp_path / "a" / "x") as fresh:
        fill(fresh, FILES)
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_files_have_the_permissions_of_new_files(tmp_path):
    with folders.written_beside(tmp_path / "x") as fresh:
        fill(fresh, FILES)
        (fresh / "unet" / "weights.safetensors").chmod(0o600)
    fill(tmp_path / "ordinary", {"unet/file": ""})
    for path in (tmp_path / "x").rglob("*"):
        like = tmp_path / "ordinary" / ("unet" if path.is_dir() else "unet/file")
        assert path.stat().st_mode == like.stat().st_mode
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


KILLED = """
import os, signal, sys
from pathlib import Path
from lowtide.checkpoint import folders

place, moment = Path(sys.argv[1]), sys.argv[2]
real_rename, real_exchange = Path.rename, folders.exchanged

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def rename(self, target):
    if moment == "before renaming":
        die()
    real_rename(self, target)
    if moment == "between renames" and self == place:
        die()
    if moment == "after renaming" and Path(target) == place:
        die()

def exchange(first, second):
    if "exchange" not in moment:
        return False  # as on a system that cannot
    if moment == "before the exchange":
        die()
    assert real_exchange(first, second)
    if moment == "after the exchange":
        die()
    return True

Path.rename = rename
folders.exchanged = exchange
with folders.written_beside(place) as fresh:
    (fresh / "model_index.json").write_text("{}")
    (fresh / "unet").mkdir()
    (fresh / "unet" / "weights.safetensors").write_text("new")
    if moment == "while writing":
        die()
    if "while removing" in moment:
        folders.shutil.rmtree = lambda path, **options: die() if path.name == "unet" else None
"""


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("while writing", "old"),
        ("before renaming", "old"),
        ("between renames", None),
        ("after renaming", "new"),
        ("while removing", "new"),
        ("before the exchange", "old"),
        ("after the exchange", "new"),
        ("while removing after an exchange", "new"),
    ],
)
def test_a_kill_is_mended_at_the_next_use(tmp_path, moment, left):
    place = write(tmp_path / "x", "old")
    ended = subprocess.run([sys.executable, "-c", KILLED, place, moment], check=False)
    assert ended.returncode == -9
    assert len(names(tmp_path)) == 2
    assert (weights(place) if place.exists() else None) == left
    folders.check_place(place)
    assert names(tmp_path) == ["x"]
    assert weights(place) == (left or "old")
    write(place, "newer")
    assert weights(place) == "newer" and names(tmp_path) == ["x"]


def test_a_reader_always_finds_a_result(tmp_path):
    """A process looks at the place while another replaces it 300 times."""
    probes = [tmp_path / "one", tmp_path / "two"]
    for probe in probes:
        probe.mkdir()
    if not exchanged(*probes):
        pytest.skip("this file system cannot exchange two entries")
    place = write(tmp_path / "x", "0")
    done = tmp_path / "done"
    script = (
        "import sys, pathlib; place, done = map(pathlib.Path, sys.argv[1:]); looks = 0\n"
        "while not done.exists():\n"
        "    assert (place / 'model_index.json').exists(), looks; looks += 1\n"
        "print(looks)"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", script, place, done], stdout=subprocess.PIPE, text=True
    )
    for number in range(300):
        write(place, str(number))
    done.touch()
    looks, _ = reader.communicate()
    assert reader.returncode == 0 and int(looks) > 100
    assert weights(place) == "299"


def test_an_old_result_that_is_half_removed_is_not_put_back(tmp_path):
    write(tmp_path / "x").rename(tmp_path / ".x-old")
    (tmp_path / ".x-old" / "model_index.json").unlink()
    folders.recover(tmp_path / "x")
    assert names(tmp_path) == []


def test_an_old_result_stays_while_something_else_stands_in_its_place(tmp_path):
    write(tmp_path / "x").rename(tmp_path / ".x-old")
    fill(tmp_path, {"x/thesis.txt": "ten years of work"})
    with refused(tmp_path, "other files"):
        work(tmp_path / "x")
    (tmp_path / "x" / "thesis.txt").unlink()
    write(tmp_path / "x", "new")
    assert names(tmp_path) == [".x-old", "x"]
    folders.check_place(tmp_path / "x")
    assert names(tmp_path) == ["x"] and weights(tmp_path / "x") == "new"


def test_folders_with_such_names_that_are_not_ours_stay(tmp_path):
    for name in (".x-old", ".x-0123abcd", ".x-new", ".y-old"):
        fill(tmp_path, {f"{name}/thesis.txt": "ten years of work"})
    write(tmp_path / "x", "old")
    before = tree(tmp_path)
    write(tmp_path / "x", "new")
    after = tree(tmp_path)
    assert after.pop("x/unet/weights.safetensors") == "new"
    del after["x/lowtide-files.json"]  # it has a hash of the weights
    kept = {name: text for name, text in before.items() if not name.startswith("x/")}
    assert after == kept | {"x/model_index.json": before["x/model_index.json"]}


def test_evidence_that_was_interrupted_is_no_obstacle(tmp_path):
    place = write(tmp_path / "x")
    fill(place, {f".evidence-0123abcd/{folders.LOCK}": "", ".evidence-0123abcd/half.png": ""})
    assert weights(write(place, "new")) == "new"
    assert not (place / ".evidence-0123abcd").exists()


def test_one_writer_at_a_time(tmp_path):
    with folders.written_beside(tmp_path / "x") as fresh:
        fill(fresh, FILES)
        with pytest.raises(BadInput, match="another lowtide that writes x; expected one at a time"):
            work(tmp_path / "x")
        write(tmp_path / "y")
    assert weights(tmp_path / "x") == "codes" and names(tmp_path) == ["x", "y"]


def test_a_writer_whose_lock_is_free_is_abandoned(tmp_path):
    fill(tmp_path, {f".x-0123abcd/{folders.LOCK}": "", ".x-0123abcd/half": ""})
    with (
        FileLock(tmp_path / ".x-0123abcd" / folders.LOCK),
        pytest.raises(BadInput, match="another"),
    ):
        work(tmp_path / "x")
    write(tmp_path / "x")
    assert names(tmp_path) == ["x"]
