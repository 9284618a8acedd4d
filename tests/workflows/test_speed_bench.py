"""`lowtide bench speed`: the table, its sums, its options, the peers, and wrong inputs.

The variants run in this process; that a process of its own takes orders is a test of its own.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch

import lowtide
from lowtide import cli
from lowtide.errors import BadInput
from lowtide.kernels import native_library
from lowtide.report import speed_tables
from lowtide.report.kinds_of_work import KINDS, PRODUCTS
from lowtide.workflows.speed_bench import calls, channel, peers, turns, variant
from lowtide.workflows.speed_bench.turns import SpeedOptions, by_kind, measure_speed
from lowtide.workflows.to_folder import quantize_to_folder

pytestmark = pytest.mark.skipif(
    native_library.native().library is None, reason=native_library.native().reason
)
OPTIONS = {"weights": 8, "steps": 3, "images": 1}
ROWS = ["packed", "float", "plain"]


class InThisProcess:
    """A variant without a process."""

    orders: list[dict] = []

    def __init__(self, command: list[str], threads: int, log: Path):
        order = json.loads(command[-1])
        self.orders.append(order)
        self.running = variant.load(order)
        self.loaded = {"load": {"cpu": 0.1, "wall": 0.1}, "libraries": 0}

    def ask(self, order: str, **options: object) -> dict:
        return json.loads(json.dumps(channel._answer(self.running, {"order": order} | options)))

    def close(self) -> None:
        self.running = None


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    InThisProcess.orders.clear()
    monkeypatch.setattr(turns, "Variant", InThisProcess)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A float model and the packed one that was made of it."""
    home = tmp_path_factory.mktemp("speed")
    floating = home / "float"
    lowtide.save(tiny_pipelines.PIPELINES["ddim"](home), floating)
    quantize_to_folder(str(floating), home / "packed", "minmax", OPTIONS)
    return str(floating), str(home / "packed")


@pytest.fixture(scope="module")
def result(folders: tuple[str, str]) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "Variant", InThisProcess)
        return measure_speed(folders[1], SpeedOptions(batch=2, repeats=8))


def test_a_row_for_each_variant(result: dict) -> None:
    assert [row["variant"] for row in result["rows"]] == ROWS
    assert result["repeats"] == 12  # two passes of first and two of later visits of 3 timesteps
    assert not result["notes"]
    packed, floating, plain = result["rows"]
    assert floating["ratio_cpu"] == floating["ratio_wall"] == 1
    assert packed["cpu"] < plain["cpu"]
    for row in result["rows"]:
        assert row["cpu"] > 0 and row["later"]["cpu"] > 0
        assert row["until_first"] > row["load"]
    json.dumps(result)


def test_parts_add_up_to_the_step(result: dict) -> None:
    """Exactly, unless the parts timed one by one take longer: by at most a quarter."""
    for row in result["rows"][:2]:
        parts = result["kinds"][row["variant"]]
        assert set(parts) <= set(KINDS)
        assert row["cpu"] * 0.999 < sum(parts.values()) < 1.25 * row["cpu"]
    layers = sum(layer["seconds"] for layer in result["layers"])
    assert layers == pytest.approx(result["kinds"]["packed"][PRODUCTS])


def test_work_of_the_layers(result: dict, folders: tuple[str, str]) -> None:
    """Two operations for each weight and position of each layer, at the batch asked for."""
    model = lowtide.load(folders[0]).unet
    counted: list[int] = []

    def count(layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        columns = layer.weight.shape[0]
        counted.append(2 * output.numel() // columns * layer.weight.numel())

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8), torch.tensor([5, 5]))
    # The temporal layers run for one sample here: all samples share the timestep.
    names = {layer["name"] for layer in result["layers"]}
    assert len(names) == len(counted)
    assert 0.9 * sum(counted) < result["operations"] <= sum(counted)
    kernels = {layer["kernel"] for layer in result["layers"]}
    assert kernels == {"native"}


def test_text_and_picture(result: dict, tmp_path: Path) -> None:
    lines = speed_tables.lines(result)
    [head] = [line for line in lines if "x float" in line and "first step" in line]
    start = lines.index(head)
    assert [line.split(",")[0] for line in lines[start + 2 : start + 5]] == [
        "lowtide",
        "torch fp32",
        "lowtide",
    ]
    assert sum(line.startswith(KINDS) for line in lines) >= len(KINDS)
    speed_tables.picture(tmp_path / "speed.png", result)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_options_are_applied_and_a_missing_peer_is_one_sentence(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "interpreter_of", lambda package: None)
    against = ("openvino", "torch", "onnxruntime")
    options = SpeedOptions(batch=3, threads=2, repeats=2, against=against, floating=folders[0])
    result = measure_speed(folders[1], options)
    assert {(order["batch"], order["threads"]) for order in InThisProcess.orders} == {(3, 2)}
    assert (result["batch"], result["threads"], result["repeats"]) == (3, 2, 2)
    rows = {layer["shape"].split(" ")[0] for layer in result["layers"]}
    assert str(3 * 8 * 8) in rows
    assert [row["variant"] for row in result["rows"]] == [*ROWS, "torch-bf16"]
    for name, note in zip(("openvino", "onnxruntime"), result["notes"], strict=True):
        missing = f"{name} was left out: {name} is not installed; pip install {name}"
        assert note.startswith(missing) and "\n" not in note


def test_first_visits_compute_the_features_again(folders: tuple[str, str], tmp_path: Path) -> None:
    order = {
        "variant": "packed",
        "model": folders[1],
        "calls": str(tmp_path / "calls.npz"),
        "threads": 1,
        "batch": 1,
        "most": 2,
    }
    running = variant.load(order)
    running.step(0)
    assert running.forget is not None
    running.forget()
    first, second = calls.read(tmp_path / "calls.npz")
    assert first["timestep"] != second["timestep"]
    assert np.array_equal(first["sample"], second["sample"])


def test_an_unknown_float_model_is_one_sentence(folders: tuple[str, str], tmp_path: Path) -> None:
    lost = tmp_path / "packed"
    lowtide.save(lowtide.load(folders[1]), lost)
    result = measure_speed(str(lost), SpeedOptions(repeats=2, against=("torch",)))
    assert [row["variant"] for row in result["rows"]] == ["packed", "plain"]
    assert result["rows"][0]["ratio_cpu"] is None
    assert ["--float MODEL" in note or "float model" in note for note in result["notes"]] == [1, 1]
    assert speed_tables.lines(result)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch 0"),
        ({"threads": 0}, "threads 0"),
        ({"repeats": 1}, "repeats 1"),
        ({"against": ("quanto",)}, "quanto"),
    ],
)
def test_wrong_options(options: dict, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        SpeedOptions(**options)


@pytest.mark.parametrize("which", ["float", "nowhere"])
def test_wrong_models_are_one_sentence(
    which: str,
    folders: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = folders[0] if which == "float" else f"{folders[0]}-nowhere"
    monkeypatch.setattr("sys.argv", ["lowtide", "bench", "speed", model])
    with pytest.raises(SystemExit) as end:
        cli.main()
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2
    assert last.startswith("error: found no") and last.count(";") == 2


CHILD = """
import os
from lowtide.workflows.speed_bench.channel import Running, serve
from lowtide.errors import BadInput
def load():
    {load}
    print("libraries print")
    threads = {{"threads": os.environ["OMP_NUM_THREADS"]}}
    return Running(lambda call: sum(range(10**5)), orders={{"parts": lambda order: threads}})
serve(load)
"""


def child(tmp_path: Path, load: str = "pass") -> channel.Variant:
    command = [sys.executable, "-c", CHILD.format(load=load)]
    return channel.Variant(command, 2, tmp_path / "log.txt")


def test_a_process_takes_orders(tmp_path: Path) -> None:
    running = child(tmp_path)
    try:
        answer = running.ask("steps", calls=[0, 1], forget=True, warm=True)
        assert len(answer["cpu"]) == len(answer["wall"]) == 2 and min(answer["cpu"]) > 0
        assert running.ask("parts") == {"threads": "2"}
        assert running.ask("memory")["peak"] >= running.loaded["libraries"] > 0
    finally:
        running.close()
    assert running.process.returncode == 0
    assert "libraries print" in (tmp_path / "log.txt").read_text()


def test_a_process_that_ends_says_why(tmp_path: Path) -> None:
    with pytest.raises(channel.Ended, match="exit code 1: OSError: no such luck"):
        child(tmp_path, "raise OSError('no such luck')")
    with pytest.raises(BadInput, match=r"^a; expected b; c$"):
        child(tmp_path, "raise BadInput('a', 'b', 'c')")


def test_calls_in_a_file(tmp_path: Path) -> None:
    arguments = {
        "sample": np.ones((1, 2), np.float32),
        "timestep": np.array(7),
        "added": {"text": np.zeros(3), "none": None},
        "return_dict": False,
    }
    calls.write(tmp_path / "calls.npz", [arguments])
    [read] = calls.read(tmp_path / "calls.npz")
    assert set(read) == {"sample", "timestep", "added/text", "return_dict"}
    assert calls.nested(read)["added"]["text"].shape == (3,)
    assert read["return_dict"] is False and read["timestep"] == 7


def test_kinds_add_up() -> None:
    steps = [{"kind": PRODUCTS, "seconds": 2.0}, {"kind": PRODUCTS, "seconds": 1.0}]
    assert by_kind(steps, 4.0) == {PRODUCTS: 3.0, KINDS[-1]: 1.0}
    assert by_kind(steps, 2.0)[KINDS[-1]] == 0
