"""Results in folders: whole or not there, other files survive, finished units serve to resume."""

import json

import numpy as np
import pytest
import tiny
import torch

import lowtide
from lowtide import estimate, sampling
from lowtide.checkpoint import facts, rescheduling
from lowtide.checkpoint.manifest import MANIFEST
from lowtide.errors import BadInput
from lowtide.methods import relevant_options
from lowtide.stages.reconstruct import Learner
from lowtide.workflows import sampled_folder, to_folder
from lowtide.workflows.demo import ACTS, Act, demo

QUICK = {"steps": 3, "images": 2, "calibration_steps": 1, "iters": 2, "batch": 2}
REQUEST = sampling.Request(steps=3, seeds=(1,))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def home(tmp_path):
    """A folder that holds a float model, `float`."""
    sampling.as_pipeline(tiny.model("unet2d")).save_pretrained(tmp_path / "float")
    return tmp_path


def quantize(home, method="minmax", out="x", **changes):
    options = relevant_options(method, QUICK | changes)
    return to_folder.quantize_to_folder(str(home / "float"), home / out, method, options)


def sample(source, out):
    return sampled_folder.sample_to_folder(str(source), out, REQUEST)


def test_the_whole_folder_is_listed_readable_and_can_be_replaced(home):
    quantize(home)
    place = home / "x"
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert {"lowtide.json", "model_index.json", "unet/config.json"} < files
    listed = json.loads((place / MANIFEST).read_text())["files"]
    assert set(listed) == files - {MANIFEST}
    (home / "file").touch()
    modes = {path.stat().st_mode for path in place.rglob("*") if path.is_file()}
    assert modes == {(home / "file").stat().st_mode}
    first = sampling.images(lowtide.load(place), REQUEST)
    quantize(home)
    assert names(home) == ["file", "float", "x"]
    assert np.array_equal(sampling.images(lowtide.load(place), REQUEST), first)


def test_a_finished_command_does_nothing(home, monkeypatch, capsys):
    first = quantize(home)
    weights = home / "x" / "unet" / "diffusion_pytorch_model.safetensors"
    written = weights.stat()
    capsys.readouterr()
    again = quantize(home)
    assert capsys.readouterr().err == (
        f"{home / 'x'} holds this result: the same model, settings and code. Nothing is done.\n"
    )
    assert again == json.loads(json.dumps(first, default=str))
    now = weights.stat()  # reading changes st_atime alone
    assert (now.st_ino, now.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_what_makes_another_result_is_done(home):
    weights = home / "x" / "unet" / "diffusion_pytorch_model.safetensors"

    def made_anew(**changes):
        before = weights.stat().st_ino
        quantize(home, **changes)
        return weights.stat().st_ino != before

    quantize(home)
    assert made_anew(weights=5)
    assert made_anew(weights=5, seed=1)
    assert not made_anew(weights=5, seed=1)
    scheduler = home / "float" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.02", "0.03"))
    assert made_anew(weights=5, seed=1)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert made_anew(weights=5, seed=1)


def test_finished_units_stay_until_the_model_stands(home, monkeypatch):
    search = Learner.search
    learnt = []

    def dying(self, loss):
        if len(learnt) == 3:
            raise KeyboardInterrupt
        learnt.append(self.unit.name)
        return search(self, loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Learner, "search", dying)
        quantize(home, "tfmq")
    assert names(home) == ["float", "x.run"]
    (units,) = home.glob("x.run/*/units")
    before = names(units)
    assert len(before) >= 3
    (home / "x.run" / "thesis.txt").write_text("ten years of work")
    repeated = []
    monkeypatch.setattr(
        Learner,
        "search",
        lambda self, loss: (repeated.append(self.unit.name), search(self, loss))[1],
    )
    quantize(home, "tfmq")
    assert repeated and not set(repeated) & set(learnt)
    assert names(home) == ["float", "x", "x.run"]
    assert names(home / "x.run") == ["thesis.txt"]
    (home / "x.run" / "thesis.txt").unlink()
    quantize(home, "tfmq")
    assert names(home) == ["float", "x"]


def test_an_interrupted_run_leaves_the_older_model(home, monkeypatch):
    quantize(home)
    before = (home / "x" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    monkeypatch.setattr("lowtide.stages.fit_weights.FitWeights.run", lambda self, job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(home, seed=1)
    after = (home / "x" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    # Calls that were collected wait in x.run for the same command.
    assert after == before and names(home) == ["float", "x", "x.run"]


def test_an_old_model_that_a_kill_moved_aside_loads(home):
    result = lowtide.quantize(
        lowtide.load(home / "float"), method="minmax", **relevant_options("minmax", QUICK)
    )
    result.save(home / "x").rename(home / ".x-old")
    ours = lowtide.load(home / "x").unet.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in result.model.state_dict().items())
    assert names(home) == ["float", "x"]


def refused(words, call, *args, **options):
    """The model is found, and then it is of the wrong kind."""
    with pytest.raises(BadInput, match=words):
        call(*args, **options)


READERS = {
    "sample": lambda place: sample(place, place.with_name("images")),
    "inspect": lambda place: facts.inspect(str(place)),
    "plan": lambda place: refused(
        "a model that is quantized already", estimate.plan, str(place), **QUICK
    ),
    "evaluate": lambda place: lowtide.evaluate(place, seeds=[1]),
    "compare": lambda place: lowtide.compare(
        place, place.with_name("float"), seeds=[1], out=place.with_name("evidence")
    ),
    "reschedule": lambda place: refused(
        "nothing depends on the step",
        rescheduling.reschedule_to_folder,
        place,
        place.with_name("again"),
        3,
    ),
}


@pytest.mark.parametrize("command", READERS)
def test_every_command_finds_a_model_that_a_kill_moved_aside(home, command):
    quantize(home)
    (home / "x").rename(home / ".x-old")
    READERS[command](home / "x")
    assert (home / "x" / "model_index.json").is_file()
    assert not (home / ".x-old").exists()


def begin(*args, **options):
    pytest.fail("the work began")


@pytest.fixture
def idle(home, monkeypatch):
    """No model may be loaded any more, and nothing may change."""
    (home / "full").mkdir()
    (home / "full" / "config.json").write_text("{}")
    (home / "full" / "thesis.txt").write_text("ten years of work")
    (home / "link").symlink_to(home / "full")
    (home / "file").write_text("text")
    monkeypatch.setattr(sampling, "load_pipeline", begin)
    monkeypatch.setattr("lowtide.estimate.plan", begin)
    before = {path: path.is_file() and path.read_bytes() for path in home.rglob("*")}
    yield home
    assert {path: path.is_file() and path.read_bytes() for path in home.rglob("*")} == before


COMMANDS = {
    "quantize": lambda home, out: quantize(home, out=out),
    "sample": lambda home, out: sample(home / "float", home / out),
    "reschedule": lambda home, out: rescheduling.reschedule_to_folder(
        home / "float", home / out, 5
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("float", "is the source itself"),
        ("float/packed", "lies inside the source"),
        (".", "contains the source"),
        ("full", r"other files in full \(first: config.json\)"),
        ("link", "a symbolic link"),
        ("file", "a file at"),
        ("file/x", "cannot be written"),
        ("n" * 300, "cannot be written"),
        ("new/..", "a folder's name"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(idle, command, out, words):
    with pytest.raises(BadInput, match=words):
        COMMANDS[command](idle, out)


def test_units_need_a_folder(home, monkeypatch):
    (home / "x.run").write_text("text")
    monkeypatch.setattr(sampling, "load_pipeline", begin)
    with pytest.raises(BadInput, match=r"found a file at .*x\.run"):
        quantize(home)
    assert names(home) == ["float", "x.run"]


def test_images_replace_images_and_nothing_else(home):
    assert sample(home / "float", home / "images")["images"] == 1
    other = sampling.Request(steps=3, seeds=(2,))
    sampled_folder.sample_to_folder(str(home / "float"), home / "images", other)
    assert names(home / "images") == [
        "grid.png",
        MANIFEST,
        sampled_folder.NAME,
        "seed-000002.png",
    ]
    quantize(home)
    with pytest.raises(BadInput, match="of another kind in x"):
        sample(home / "float", home / "x")
    (home / "images" / "photo.png").write_text("holidays")
    with pytest.raises(BadInput, match=r"first: photo\.png"):
        sample(home / "float", home / "images")


@pytest.mark.parametrize(
    "place", ["digits/best/thesis.txt", "digits/evidence/x", "digits/demo.png"]
)
def test_the_demo_looks_at_every_place_first(tmp_path, monkeypatch, place):
    monkeypatch.setattr(to_folder, "quantize_to_folder", begin)
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text("ten years of work")
    with pytest.raises(BadInput, match=r"other files|a file at .*demo\.png"):
        demo(tmp_path, acts=[Act("zoo:digits", "digits", 2, 2), *ACTS[:1]])
    assert (tmp_path / place).read_text() == "ten years of work"
