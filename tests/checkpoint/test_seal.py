"""A checkpoint proves itself: plan, kinds of tensors and configurations have hashes too."""

import json
import shutil
import struct

import pytest
import tiny_pipelines
from diffusers import DiffusionPipeline, UNet2DModel

import lowtide
from lowtide.checkpoint.manifest import MANIFEST
from lowtide.checkpoint.seal import CONFIG, KINDS, OPEN, SEAL
from lowtide.errors import BadInput

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("seal")
    pipe = tiny_pipelines.ddim(home)
    result = lowtide.quantize(pipe, method="minmax", steps=3, images=1)
    result.save(home / "packed")
    return home / "packed", result


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "copy")


def header_of(path):
    data = path.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def edit_header(path, change):
    header, rest = header_of(path)
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_range(header):
    entries = header["__metadata__"]
    entries["lowtide_plan"] = entries["lowtide_plan"].replace('"bits":8', '"bits":7')


def other_type(header):
    header["lowtide_clock.timesteps"]["dtype"] = "F32"


def other_shape(header):
    shape = header["lowtide_clock.scale"]["shape"]
    shape.reverse()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_range, "the plan"),
        (other_type, "the type or the shape of a tensor"),
        (other_shape, "the type or the shape of a tensor"),
    ],
)
@pytest.mark.parametrize("load", [lowtide.load, DiffusionPipeline.from_pretrained])
def test_an_altered_header_is_refused(folder, change, what, load):
    (folder / MANIFEST).unlink()
    edit_header(folder / WEIGHTS, change)
    with pytest.raises(BadInput, match=f"found {what} altered since"):
        load(folder)


@pytest.mark.parametrize("load", [lowtide.load, DiffusionPipeline.from_pretrained])
def test_an_altered_network_is_refused(folder, load):
    edit_json(folder / "unet" / "config.json", norm_eps=1e-3)
    with pytest.raises(BadInput, match=r"found (unet/)?config.json .*altered since"):
        load(folder)


def test_an_altered_scheduler_is_refused(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    edit_json(path, beta_schedule="squaredcos_cap_v2")
    with pytest.raises(BadInput, match=r"found scheduler/scheduler_config.json .* altered since"):
        lowtide.load(folder)
    assert lowtide.load(folder, verify="off").scheduler.config.beta_schedule.startswith("squared")
    path.unlink()
    with pytest.raises(BadInput, match="missing since lowtide wrote it"):
        lowtide.load(folder)


def test_another_version_of_diffusers_is_no_alteration(folder):
    edit_json(folder / "unet" / "config.json", _diffusers_version="0.99", _name_or_path="elsewhere")
    assert isinstance(UNet2DModel.from_pretrained(folder / "unet"), UNet2DModel)


def test_how_much_is_verified(folder):
    header, rest = header_of(folder / WEIGHTS)
    start = header["conv_in.bias"]["data_offsets"][0]
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[len(data) - len(rest) + start] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(BadInput, match=r"found tensor conv_in.bias altered"):
        lowtide.load(folder)
    lowtide.load(folder, verify="fast")
    edit_header(folder / WEIGHTS, other_shape)
    with pytest.raises(BadInput, match=f"found {WEIGHTS} in .* altered since lowtide wrote it"):
        lowtide.load(folder, verify="fast")
    (folder / MANIFEST).unlink()
    with pytest.raises(BadInput, match="the shape of a tensor"):
        lowtide.load(folder, verify="fast")
    with pytest.raises(BadInput, match="found verify 'most'; expected one of full, fast, off"):
        lowtide.load(folder, verify="most")


def test_the_same_content_gives_the_same_bytes(made, tmp_path):
    first, result = made
    second = result.save(tmp_path / "again")
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    entries = header_of(first / WEIGHTS)[0]["__metadata__"]
    assert list(entries) == sorted(entries) and entries[CONFIG] != OPEN


def test_save_pretrained_knows_no_configuration_but_seals_the_plan(made, tmp_path):
    _, result = made
    result.pipe.save_pretrained(tmp_path / "plain")
    entries = header_of(tmp_path / "plain" / WEIGHTS)[0]["__metadata__"]
    assert entries[CONFIG] == OPEN and entries[SEAL] != OPEN
    edit_json(tmp_path / "plain" / "unet" / "config.json", _class_name="UNet2DModel")
    lowtide.load(tmp_path / "plain")
    edit_header(tmp_path / "plain" / WEIGHTS, other_range)
    with pytest.raises(BadInput, match="altered since"):
        lowtide.load(tmp_path / "plain")


def test_a_file_without_a_seal_loads_as_before(folder):
    def open_it(header):
        for name in (SEAL, KINDS, CONFIG):
            del header["__metadata__"][name]

    edit_header(folder / WEIGHTS, open_it)
    (folder / MANIFEST).unlink()
    config = json.loads((folder / "unet" / "config.json").read_text())
    del config["quantization_config"]["seals"]
    edit_json(folder / "unet" / "config.json", **config)
    assert isinstance(lowtide.load(folder), DiffusionPipeline)
