"""A file that was altered, truncated or mixed up is an error, never a blurred picture."""

import json
import shutil
import struct

import pytest
import tiny
import tiny_pipelines
import torch
from safetensors.torch import load_file, save_file

import lowtide
from lowtide import sampling
from lowtide.checkpoint.file_format import PLAN, read_metadata
from lowtide.checkpoint.manifest import MANIFEST
from lowtide.checkpoint.quantized_pipeline import Quantized
from lowtide.errors import BadInput
from lowtide.nn.plan import Plan
from lowtide.report.wording import size

FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def quantized():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    return lowtide.quantize(pipe, method="minmax", steps=3, images=2)


@pytest.fixture(scope="module")
def packed(quantized, tmp_path_factory):
    return quantized.save(tmp_path_factory.mktemp("packed") / "x")


def test_the_repr_is_one_line(quantized):
    layers = len(quantized.plan.layers)
    total = size(quantized.report["account"]["total"])
    assert repr(quantized) == f"Quantized(DDIMPipeline, minmax W4A8, {layers} layers, {total})"
    assert repr(Quantized(quantized.pipe, Plan(), {})) == "Quantized(DDIMPipeline, 0 layers)"


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def rewritten(folder, change):
    """Change the tensors of the file and keep its header, in a folder without a list of files."""
    (folder / MANIFEST).unlink()
    path = folder / FILE
    header = read_metadata(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, header)


def test_flipped_bytes(copy):
    path = copy / FILE
    raw = bytearray(path.read_bytes())
    raw[-200] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(BadInput, match="altered since it was saved"):
        lowtide.load(copy)


def test_truncated(copy):
    path = copy / FILE
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(BadInput, match=r"safetensors in .* where tensor \S+ has bytes"):
        lowtide.load(copy)


def test_nan_scale(copy):
    rewritten(copy, lambda tensors: tensors["conv_in.grid"].view(torch.float32).fill_(float("nan")))
    with pytest.raises(BadInput, match=r"conv_in\.grid altered"):
        lowtide.load(copy)


def test_missing_tensor(copy):
    rewritten(copy, lambda tensors: tensors.pop("conv_in.grid"))
    with pytest.raises(BadInput, match=r"conv_in\.grid, missing"):
        lowtide.load(copy)


def test_unknown_tensor(copy):
    rewritten(copy, lambda tensors: tensors.update(stranger=torch.zeros(1)))
    with pytest.raises(BadInput, match="stranger, unknown"):
        lowtide.load(copy)


def test_a_file_of_another_library(copy):
    save_file(load_file(copy / FILE), copy / FILE)
    with pytest.raises(BadInput, match=f"found {FILE} in .* altered since lowtide wrote it"):
        lowtide.load(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(BadInput, match="no lowtide plan"):
        lowtide.load(copy)


@pytest.mark.parametrize(
    ("version", "way_out"), [(99, "upgrade lowtide"), (1, "quantize the float model again")]
)
def test_another_format(copy, version, way_out):
    config = json.loads((copy / "unet" / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    (copy / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=way_out):
        lowtide.load(copy, verify="off")


def test_config_says_what_it_is_and_stays_small(packed):
    config = json.loads((packed / "unet" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"].startswith("lowtide (pip install lowtide, then import lowtide")
    assert (config["summary"]["weights"], config["summary"]["inputs"]) == (4, 8)
    assert len(json.dumps(config)) < 2048


def test_the_plan_in_the_header_is_the_plan_of_the_model(packed):
    plan = Plan.from_json(read_metadata(packed / FILE)[PLAN])
    assert plan == lowtide.load(packed).unet.hf_quantizer.plan
    assert Plan.from_json(plan.to_json()) == plan
    with open(packed / FILE, "rb") as file:
        assert struct.unpack("<Q", file.read(8))[0] < 40_000


def test_sharded_saves_load_the_same(packed, tmp_path):
    model = lowtide.load(packed).unet
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    again = type(model).from_pretrained(tmp_path / "sharded").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_saving_prints_nothing(tmp_path, capfd):
    """transformers draws a bar for the text encoder's weights."""
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    capfd.readouterr()
    pipe.save_pretrained(tmp_path / "by-diffusers")
    assert "Writing model shards" in capfd.readouterr().err
    lowtide.save(pipe, tmp_path / "by-lowtide")
    assert capfd.readouterr() == ("", "")
