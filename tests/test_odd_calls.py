"""No text that a user types and no file that he names gives a traceback: one sentence each."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from test_cli import assert_one_sentence, lowtide  # noqa: F401

from lowtide.workflows.to_folder import quantize_to_folder

NO_NUMBERS = ("abc", "", "1e18", "nan", "0x10", "1 2", "--", "9" * 400)
# For each option of quantize: texts that it does not take.
WRONG = {
    "--weights": (*NO_NUMBERS, "0", "9", "-4", "4.5", "33"),
    "--inputs": (*NO_NUMBERS, "0", "9", "64"),
    "--group": ("0", "-1", "a", "1.5"),
    "--profile": ("half", "", "FULL", "full,paper", "paper"),
    "--ends": (*NO_NUMBERS, "0", "9"),
    "--end-inputs": ("0", "x"),
    "--softmax": ("0", "x", "4.5"),
    "--temporal": ("0", "x"),
    "--temporal-inputs": ("0", "x"),
    "--scheduler": ("", "DDIM", "plms", "ddim,pndm"),
    "--spacing": ("", "cubic"),
    "--pictures": ("nowhere", "/"),
    "--call": ("nowhere.json", "/", "."),
    "--steps": (*NO_NUMBERS, "0", "-3", "1001", "1.5"),
    "--images": (*NO_NUMBERS, "0", "-1", str(10**18)),
    "--calibration-steps": ("0", "x", "-2"),
    "--labels": ("a", "5-3", "-1", "1-", "0-9;12", "0-99999999999", "3"),
    "--guidance": ("strong", "nan", "inf", "7"),
    "--eta": ("nan", "-0.1", "1.1", "x"),
    "--size": ("0", "-8", "8x8", "64"),
    "--seed": (str(2**70), "-1", "x", "1.5"),
    "--memory": ("-1", "lots", "1.5"),
    "--iters": ("0", "-1", "1e3", "many"),
    "--batch": ("0", "-1", "x"),
    "--scope": ("model", "", "Block"),
    "--drop": ("2", "-0.5", "nan", "half"),
    "--range-iters": ("-1", "x"),
    "--without": ("nothing", "", "collect", "pack", "tiar,fsc"),
    "--method": ("magic", "", "TFMQ", "tfmq,best"),
    "--set": (
        "x", "=", "iters", "=3", "itters=5", "iters=[1]", "iters=abc", "omq.", ".=1", "omq.plus=1",
        "omq.plus.more=true", "weights=9", "stages=3", "prompts=a", "labels=[-1]", "tiar.times=0",
        "memory=256", "tiar.speed=1", "drop=nan", "early_stop=1",
    ),
    "--prompts": ("nowhere.txt", "/", "."),
}  # fmt: skip
CALLS = [(option, text) for option, texts in WRONG.items() for text in texts]


@pytest.mark.parametrize(("option", "text"), CALLS)
def test_an_option_of_quantize(lowtide, tmp_path, option, text):  # noqa: F811
    ended = lowtide("quantize", "zoo:digits", "--out", tmp_path / "out", f"{option}={text}")
    assert_one_sentence(ended)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "model",
    ["", " ", "zoo:", "zoo:nothing", "zoo:../zoo", "zoo:/", "~", "a/b/c", "./", "..", "/", "/proc",
     "nowhere", "file", "empty", "brace", "list", "null", "number", "binary", "strange", "bare",
     "config"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_model(lowtide, tmp_path, monkeypatch, command, model):  # noqa: F811
    monkeypatch.chdir(_odd_folders(tmp_path))
    assert_one_sentence(lowtide(command, model))


def _odd_folders(home: Path) -> Path:
    """A folder of models that are none."""
    (home / "file").write_text("not a folder")
    contents = {
        "empty": {},
        "brace": {"model_index.json": b"{"},
        "list": {"model_index.json": b"[]"},
        "null": {"model_index.json": b"null"},
        "number": {"model_index.json": b"3"},
        "binary": {"model_index.json": bytes(range(256))},
        "strange": {"model_index.json": b'{"_class_name": "NoPipeline"}'},
        "bare": {"config.json": b'{"_class_name": "NoModel"}'},
        "config": {"config.json": b"{"},
    }
    for name, files in contents.items():
        (home / name).mkdir()
        for file, content in files.items():
            (home / name / file).write_bytes(content)
    return home


PROMPTS = {
    "binary": bytes(range(256)),
    "utf-16": "a cat".encode("utf-16"),
    "empty": b"",
    "blank": b" \n\n\t\n",
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("command", ["quantize", "sample"])
def test_a_file_of_prompts(lowtide, tmp_path, command, name):  # noqa: F811
    path = tmp_path / "prompts.txt"
    path.write_bytes(PROMPTS[name])
    out = tmp_path / "out"
    assert_one_sentence(lowtide(command, "zoo:digits", "--out", out, "--prompts", path))
    assert not out.exists()


RECIPES = {
    "no TOML": b"model = 3 = 4",
    "binary": bytes(range(256)),
    "utf-16": "model = 'x'".encode("utf-16"),
    "model": b"model = 5\nmethod = 'tfmq'",
    "settings": b"model = 'x'\nmethod = 'tfmq'\nsettings = 5",
    "without": b"model = 'x'\nmethod = 'tfmq'\nwithout = [5]",
    "rows": b"model = 'x'\nrows = 3",
    "no rows": b"model = 'x'\n[rows]",
    "method": b"model = 'x'\nmethod = 'magic'",
    "key": b"model = 'x'\nmethod = 'tfmq'\nspeed = 1",
    "setting": b"model = 'x'\nmethod = 'tfmq'\n[settings]\nweights = 'four'",
    "stages": b"model = 'x'\nmethod = 'tfmq'\nstages = [1]",
    "empty": b"",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(lowtide, tmp_path, name):  # noqa: F811
    path = tmp_path / "x.toml"
    path.write_bytes(RECIPES[name])
    assert_one_sentence(lowtide("run", path, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["nowhere.toml", ".", "/", "", "x" * 300])
def test_no_recipe(lowtide, tmp_path, path):  # noqa: F811
    assert_one_sentence(lowtide("run", path, "--out", tmp_path / "out"))


PLACES: dict[str, Callable[[Path], str]] = {
    "under a file": lambda home: str(_file(home) / "out"),
    "a file": lambda home: str(_file(home)),
    "a long name": lambda home: str(home / ("x" * 300)),
    "proc": lambda home: "/proc/x",
    "here": lambda home: ".",
    "nothing": lambda home: "",
    "up again": lambda home: "new/..",
    "a symlink": lambda home: str(_link(home)),
    "root": lambda home: "/",
    "the source": lambda home: str(home / "model"),
    "in the source": lambda home: str(home / "model" / "packed"),
    "around the source": lambda home: str(home),
}


def _file(home: Path) -> Path:
    path = home / "thesis.txt"
    path.write_text("ten years of work")
    return path


def _link(home: Path) -> Path:
    (home / "elsewhere").mkdir()
    os.symlink(home / "elsewhere", home / "link")
    return home / "link"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["quantize", "sample"])
def test_a_place(lowtide, tmp_path, monkeypatch, command, place):  # noqa: F811
    tiny.model("unet2d").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    out = PLACES[place](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    quick = ("--steps", 1) if command == "sample" else ("--method", "minmax", "--steps", 1)
    assert_one_sentence(lowtide(command, tmp_path / "model", "--out", out, *quick))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("packed")
    tiny.model("unet2d").save_pretrained(home / "model")
    options = {"steps": 2, "images": 2}
    quantize_to_folder(str(home / "model"), home / "run", "minmax", options)
    return home / "run"


EVALUATIONS = [
    ("--seeds", text)
    for text in ("", "a", "5-3", "0,0", "0-3,2", str(2**70), "0-99999999999", "1.5")
]
EVALUATIONS += [("--min-psnr", text) for text in ("nan", "inf", "-inf", "x")]
EVALUATIONS += [("--max-lpips", "nan"), ("--max-fd-increase", "nan")]
EVALUATIONS += [("--metrics", text) for text in ("beauty", "psnr,beauty", "fd")]
EVALUATIONS += [("--dataset", text) for text in ("nowhere", "", "empty", "bad", "empty.npz")]
EVALUATIONS += [("--dataset", "text.npz"), ("--reference", "nowhere"), ("--steps", "0")]
EVALUATIONS += [("--batch", "0"), ("--guidance", "nan"), ("--labels", "1"), ("--eta", "2")]


@pytest.mark.parametrize(("option", "text"), EVALUATIONS)
def test_an_option_of_evaluate(lowtide, packed, tmp_path, monkeypatch, option, text):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "image.png").write_text("not an image")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("not an archive")
    ended = lowtide("evaluate", packed, "--out", tmp_path / "out", f"{option}={text}")
    assert_one_sentence(ended)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["abc", "", "-1", "0", "1e9999", "4 parsecs", "nan", "1"])
def test_a_size_to_fit(lowtide, size):  # noqa: F811
    assert_one_sentence(lowtide("plan", "zoo:digits", f"--fit={size}"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize",),
        ("quantize", "zoo:digits"),
        ("quantise", "zoo:digits"),
        ("sample", "zoo:digits", "--out", "x", "--bogus", "1"),
        ("sample", "zoo:digits", "more", "--out", "x"),
        ("compare",),
        ("compare", "zoo:digits"),
        ("bench", "speed"),
        ("bench", "quality", "zoo:digits", "--methods", "magic"),
        ("bench", "quality", "zoo:digits", "--widths", "W4"),
        ("bench", "quality", "zoo:digits", "--widths", "W9A9"),
        ("bench", "quality", "zoo:digits", "--seeds", "x"),
        ("bench", "quality", "zoo:digits", "--samples", "0"),
        ("quantize", "zoo:digits", "--out", "x", "--method", "minmax", "--iters", "5"),
        ("quantize", "zoo:digits", "--out", "x", "--method", "mpq", "--scope", "layer"),
        ("plan", "zoo:digits", "--method", "efficientdm", "--set", "drop=0.5"),
        ("plan", "zoo:digits", "--method", "tfmq", "--set", "only_schedule=true"),
        ("plan", "zoo:digits", "--method", "ptq4dm", "--set", "range_iters=5"),
        ("demo", "--iters", "0"),
        ("reschedule", "zoo:digits", "--steps", "5", "--out", "x"),
        ("reschedule", "nowhere", "--steps", "5", "--out", "x"),
        ("evaluate", "zoo:digits"),
        ("evaluate", "nowhere"),
    ],
    ids=" ".join,
)
def test_a_command_line(lowtide, tmp_path, monkeypatch, arguments):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(lowtide(*arguments))
    assert list(tmp_path.iterdir()) == []


def test_there_are_many_odd_calls():
    assert len(CALLS) + len(EVALUATIONS) + 2 * len(PLACES) + len(RECIPES) >= 150
