"""lowtide verify: what is wrong with a folder, a sentence for each thing."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny_pipelines
import torch

import lowtide
from lowtide import cli
from lowtide.checkpoint.facts import packed_plan
from lowtide.checkpoint.values import value_problems
from lowtide.checkpoint.verification import problems_of
from lowtide.errors import BadInput
from lowtide.nn.plan import Plan
from lowtide.nn.swap import find_clock, packed_layers, quantizers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("verify")
    pipe = tiny_pipelines.ddim(home)
    result = lowtide.quantize(pipe, method="tfmq", steps=3, images=1, iters=1, batch=1)
    result.save(home / "packed")
    return home / "packed", result


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "copy")


def test_a_folder_as_it_was_written(folder):
    assert problems_of(folder) == []
    assert value_problems(tiny_pipelines.ddim(folder).unet, Plan()) == []


def test_every_altered_file_is_named(folder):
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("linear", "scaled_linear"))
    (folder / "model_index.json").unlink()
    first, second, third = problems_of(folder)
    assert first == "model_index.json is missing"
    assert second == "scheduler/scheduler_config.json was altered"
    assert third.startswith("found no model in copy")


def test_a_flipped_byte_is_named(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    [problem] = problems_of(folder)
    assert problem.startswith("found tensor ") and "altered since it was saved" in problem


def test_values_that_no_quantization_gives_are_named(folder):
    """They can stand in a file whose hashes are right."""
    model = lowtide.load(folder, fused=False).unet
    clock = find_clock(model)
    name, layer = next(packed_layers(model))
    inputs = quantizers(model)
    first, second, third = list(inputs)[:3]
    clock.scale[inputs[first].row] = 0
    clock.scale[inputs[second].row, 0] = torch.nan
    inputs[third].format = replace(inputs[third].format, bits=4)
    clock.zero[inputs[third].row] = 16
    clock.timesteps[0] += 1
    layer.tables()[0][0] = -1
    model.conv_out.bias.data[0] = torch.inf
    problems = value_problems(model, packed_plan(model))
    owners = [each.removesuffix(".input") for each in (first, second, third)]
    assert f"{owners[0]}: a scale of its input is not positive (lowtide_clock.scale)" in problems
    assert f"{owners[1]}: a scale of its input is NaN or infinite (lowtide_clock.scale)" in problems
    assert (
        f"{owners[2]}: a zero point of its input is beyond its bits (lowtide_clock.zero)"
        in problems
    )
    assert f"{name}: a scale of its weights is not positive" in problems
    wrong = "lowtide_clock.timesteps, those of the tables, differ from those of the plan"
    assert wrong in problems
    assert "conv_out.bias holds NaN or infinity" in problems
    assert "lowtide_clock.scale holds NaN or infinity" in problems
    assert len(problems) == 7


def test_the_command(folder, monkeypatch, capsys):
    def exit_code(*options):
        monkeypatch.setattr("sys.argv", ["lowtide", "verify", str(folder), *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0

    assert exit_code() == 0
    assert " is whole: " in capsys.readouterr().out
    (folder / "model_index.json").write_text("{")
    assert exit_code("--json") == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert problems[0] == "model_index.json was altered"


def test_what_is_no_folder_of_ours(tmp_path):
    with pytest.raises(BadInput, match=r"found no lowtide-files.json in"):
        problems_of(tmp_path)
    with pytest.raises(BadInput, match="found no folder"):
        problems_of(tmp_path / "nowhere")
