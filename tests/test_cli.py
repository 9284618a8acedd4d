"""The command line: one sentence and exit code 2 for a wrong input, JSON on stdout, numbers."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
from safetensors import SafetensorError

from lowtide import __version__, cli
from lowtide.cli import options
from lowtide.errors import BadInput
from lowtide.workflows.to_folder import quantize_to_folder


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def lowtide(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command line in this process, as the shell would."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["lowtide", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Ended(end.value.code or 0, *capfd.readouterr())

    return run


def assert_one_sentence(ended: Ended, *words: str) -> None:
    """Found, expected, way out; the last line of stderr, and no traceback."""
    last = ended.err.strip().splitlines()[-1]
    assert ended.code == 2, ended.err
    assert (
        last.startswith("error: ")
        and last.count(";") >= 2
        and "expected" in last
        and last.endswith(".")
    )
    assert "Traceback" not in ended.err and ended.out == ""
    for word in words:
        assert word in last


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("5", (5,)),
        ("0-3", (0, 1, 2, 3)),
        ("0-2,7", (0, 1, 2, 7)),
        (" 4 , 2-3 ", (4, 2, 3)),
        ("6-6", (6,)),
    ],
)
def test_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert options.numbers(text) == numbers


@pytest.mark.parametrize(
    "text",
    ["a", "5-3", "-1", "1-", "1.5", "1-2-3", "0-9;12", "0-99999999999", "0-9" + 20 * "9", "²"],
)
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match="expected"):
        options.numbers(text)


@pytest.mark.parametrize(
    ("option", "bits"), [("-w", 0), ("-w", 9), ("-w", 17), ("-a", 0), ("-a", 9), ("-a", 33)]
)
def test_bits_out_of_range(lowtide, tmp_path: Path, option: str, bits: int) -> None:
    assert_one_sentence(
        lowtide("quantize", "zoo:digits", "--out", tmp_path / "out", option, bits),
        str(bits),
        "1 to 8",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["quantize", "sample"])
def test_folder_without_a_model(lowtide, tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_sentence(lowtide(command, tmp_path / "empty", "--out", tmp_path / "out"), "no model")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("name", ["zoo:nothing", "./nowhere", "nowhere"])
def test_no_such_model(lowtide, name: str) -> None:
    assert_one_sentence(lowtide("inspect", name), name.removeprefix("zoo:"))


def test_unknown_method(lowtide, tmp_path: Path) -> None:
    tiny.unet2d().save_pretrained(tmp_path / "model")
    ended = lowtide("quantize", tmp_path / "model", "--out", tmp_path / "out", "--method", "magic")
    assert_one_sentence(ended, "'magic'", "tfmq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--steps", 0), ("--images", 0), ("--iters", -1), ("--profile", "half")]
)
def test_settings_out_of_range(lowtide, tmp_path: Path, option: str, value: object) -> None:
    assert_one_sentence(
        lowtide("quantize", "zoo:digits", "--out", tmp_path / "out", option, value),
        option[2:],
        str(value),
    )


def test_architecture_nobody_knows(lowtide, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert_one_sentence(lowtide("inspect", tmp_path), "AutoencoderKL")


def test_class_conditional_without_labels(lowtide, tmp_path: Path) -> None:
    tiny.unet2d(num_class_embeds=10).save_pretrained(tmp_path / "model")
    assert_one_sentence(
        lowtide("quantize", tmp_path / "model", "--out", tmp_path / "out", "--steps", 2), "label"
    )
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers(lowtide, tmp_path: Path) -> None:
    model = tiny.unet2d()
    with torch.no_grad():
        model.conv_out.weight[0, 0, 0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    assert_one_sentence(
        lowtide("quantize", tmp_path / "model", "--out", tmp_path / "out"), "NaN", "conv_out.weight"
    )


def test_truncated_weights(lowtide, tmp_path: Path) -> None:
    tiny.unet2d().save_pretrained(tmp_path / "model")
    weights = next((tmp_path / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_one_sentence(
        lowtide("sample", tmp_path / "model", "--out", tmp_path / "out"), "unreadable"
    )


def test_prompts_that_are_none(lowtide, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n \n")
    ended = lowtide(
        "quantize", "zoo:digits", "--out", tmp_path / "out", "--prompts", tmp_path / "prompts.txt"
    )
    assert_one_sentence(ended, "no prompt")


def test_folder_with_other_files_is_left_alone(lowtide, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    assert_one_sentence(lowtide("quantize", "zoo:digits", "--out", tmp_path), "other files")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def broken(error: BaseException) -> Callable[[], None]:
    def methods() -> None:
        raise error

    return methods


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "quota"),
        SafetensorError("I/O error: No space left on device"),
    ],
)
def test_full_disk(lowtide, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("lowtide.methods.methods", broken(error))
    assert_one_sentence(lowtide("methods"), "full")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowtide.methods.methods", broken(ZeroDivisionError("a bug")))
    monkeypatch.setattr("sys.argv", ["lowtide", "methods"])
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main()


def test_interrupt_ends_with_130(lowtide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowtide.methods.methods", broken(KeyboardInterrupt()))
    result = lowtide("methods")
    assert result.code == 130 and result.err == "interrupted; nothing was changed\n"


def test_options_of_stages(lowtide, tmp_path: Path) -> None:
    tiny.unet2d().save_pretrained(tmp_path / "model")
    found = json.loads(
        lowtide(
            "plan",
            tmp_path / "model",
            "--method",
            "mpq",
            "--set",
            "omq.plus=true",
            "--set",
            "steps=3",
            "--json",
        ).out
    )
    assert found["options"] == {"omq": {"plus": True}}
    for command in (("quantize", "--out", tmp_path / "out"), ("plan",)):
        ended = lowtide(
            command[0], tmp_path / "model", *command[1:], "--method", "mpq", "--set", "omq.plus=yes"
        )
        assert_one_sentence(ended, "OMQ plus 'yes'", "true or false")
    asked = ("--methods", "mpq,tfmq", "--set", "omq.plus=true", "--out", tmp_path / "cells")
    assert_one_sentence(
        lowtide("bench", "quality", tmp_path / "model", *asked), "no stage 'omq'", "TIAR: times"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_wrong_usage_ends_with_2(lowtide) -> None:
    assert lowtide("quantize", "zoo:digits").code == 2


def test_json_is_one_object(lowtide) -> None:
    ended = lowtide("methods", "--json")
    assert ended.code == 0
    assert {"minmax", "tfmq"} <= {method["name"] for method in json.loads(ended.out)["methods"]}


def test_sample_writes_one_image_for_each_seed(lowtide, tmp_path: Path) -> None:
    tiny.unet2d().save_pretrained(tmp_path / "model")
    ended = lowtide(
        "sample",
        tmp_path / "model",
        "--out",
        tmp_path / "out",
        "--seeds",
        "3,5-6",
        "--steps",
        2,
        "--json",
    )
    assert ended.code == 0 and json.loads(ended.out)["images"] == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("seed-*")) == [
        f"seed-{seed:06d}.png" for seed in (3, 5, 6)
    ]


def test_json_of_inspect_adds_up(lowtide, tmp_path: Path) -> None:
    model = tiny.unet2d()
    model.save_pretrained(tmp_path / "model")
    found = json.loads(lowtide("inspect", tmp_path / "model", "--json").out)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert sum(unit["weights"] for unit in found["units"]) == sum(
        int(np.prod(layer["shape"])) for layer in found["layers"]
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("packed")
    tiny.model("unet2d").save_pretrained(home / "model")
    options = {"steps": 2, "images": 2, "calibration_steps": 1, "iters": 1, "batch": 2}
    quantize_to_folder(str(home / "model"), home / "run", "tfmq", options)
    return home / "run"


def test_evaluate_writes_evidence_and_says_where(lowtide, packed: Path) -> None:
    ended = lowtide("evaluate", packed, "--seeds", "3,5", "--min-psnr", 1, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["request"]["seeds"] == [3, 5] and found["request"]["steps"] == 2
    assert found["command"] == f"lowtide evaluate {packed} --seeds 3,5 --min-psnr 1 --json"
    assert Path(found["report"]).read_text().startswith("<!")
    assert sorted(
        path.name for path in (packed / "evidence" / "images" / "tfmq-w4a8").iterdir()
    ) == ["3.png", "5.png"]


def test_a_failed_gate_ends_with_1(lowtide, packed: Path, tmp_path: Path) -> None:
    ended = lowtide("evaluate", packed, "--out", tmp_path / "x", "--seeds", 1, "--min-psnr", 99)
    assert ended.code == 1 and (tmp_path / "x" / "evidence.json").exists()
    assert ended.err.strip().splitlines()[-1].startswith("gate failed: tfmq W4A8: PSNR ")
    assert "tfmq W4A8" in ended.out and "report: " in ended.out


def test_compare_takes_any_mix(lowtide, packed: Path, tmp_path: Path) -> None:
    ended = lowtide(
        "compare",
        packed,
        packed.parent / "model",
        packed,
        "--out",
        tmp_path / "x",
        "--seeds",
        1,
        "--json",
    )
    found = json.loads(ended.out)
    assert ended.code == 0 and len(found["models"]) == 3 and found["reference"] == "model-in-float"


DRAW = ("--seeds", "0")
QUANTIZE = ("--method", "minmax", "--steps", 2, "--images", 2)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("quantize", QUANTIZE),
        ("sample", ("--steps", 2, *DRAW)),
        ("evaluate", DRAW),
        ("compare", DRAW),
    ],
)
def test_a_result_that_is_replaced_is_announced_once(
    lowtide, packed: Path, tmp_path: Path, command: str, options: tuple[object, ...]
) -> None:
    model = packed.parent / "model"
    sources = {"evaluate": [packed], "compare": [model, packed]}.get(command, [model])
    line = (command, *sources, *options, "--out", tmp_path / "x")
    assert "replaces" not in lowtide(*line).err
    # A command does nothing where its very result stands, so another seed is asked for.
    again = lowtide(*line, *(("--seed", 1) if command == "quantize" else ("--seeds", "1")))
    sentence = f"{tmp_path / 'x'} holds an earlier result; the new one replaces all of it.\n"
    assert again.code == 0 and again.err.count(sentence) == again.err.count("replaces") == 1


def test_evaluate_what_cannot_be(lowtide, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_sentence(lowtide("evaluate", tmp_path / "empty"), "no model in empty")
    assert_one_sentence(lowtide("evaluate", packed, "--metrics", "beauty"), "'beauty'", "psnr")
    assert_one_sentence(lowtide("evaluate", packed, "--metrics", "fd"), "fd", "--dataset")
    assert_one_sentence(lowtide("evaluate", packed.parent / "model"), "float model", "compare")
    assert_one_sentence(lowtide("compare", packed, "--out", tmp_path / "x"), "1 model", "two")
    bare = shutil.copytree(
        packed,
        tmp_path / "bare",
        ignore=lambda home, names: {"lowtide.json", "evidence"} & set(names),
    )
    assert_one_sentence(lowtide("evaluate", bare), "lowtide.json", "--reference")
    tiny.unet2d(sample_size=16).save_pretrained(tmp_path / "large")
    ended = lowtide("compare", packed, tmp_path / "large", "--out", tmp_path / "x")
    assert_one_sentence(ended, "sample size 16", "sample size 8")
    assert not (tmp_path / "x").exists()


def test_the_version_is_one_line(lowtide) -> None:
    assert lowtide("--version") == Ended(0, f"lowtide {__version__}\n", "")


GO_ON = "give the same command again to go on where it stopped"


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize(
    ("command", "way_out"),
    [("sample", GO_ON), ("convert", "nothing was changed")],
)
def test_a_stopped_command_says_how_to_go_on(name, code, command, way_out):
    script = (
        "import os, signal, time, typer\n"
        # A background job of a shell starts with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lowtide import cli\n"
        "from lowtide.cli import commands\n"
        "app = commands.app = typer.Typer()\n"
        "app.callback()(lambda: None)\n"
        f"@app.command({command!r})\n"
        f"def wait(): os.kill(os.getpid(), signal.{name}); time.sleep(60)\n"
        "cli.main()"
    )
    line = [sys.executable, "-c", script, command]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert ended.returncode == code
    assert ended.stderr == f"interrupted; {way_out}\n"
