"""Files of earlier versions load, and their hashes are compared as they were taken then."""

import base64
import hashlib
import json

import pytest
import tiny
import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lowtide
from lowtide.checkpoint.file_format import HASHES, VERSION
from lowtide.errors import BadInput

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path):
    """A packed model whose config.json names no weights."""
    tiny.model("dit").save_pretrained(tmp_path / "float")
    config = lowtide.LowtideConfig(weights=4, inputs=8)
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    edit_config(tmp_path / "packed", seals=[])
    return tmp_path / "packed"


def write_as(folder, version, hash):
    """Write the same tensors as that version did."""
    state = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        header = file.metadata()
    found = b"".join(hash(state[name].numpy().tobytes()) for name in sorted(state))
    changes = {VERSION: str(version), HASHES: base64.b64encode(found).decode()}
    save_file(state, folder / WEIGHTS, metadata=header | changes)
    edit_config(folder, format_version=version)


def blake(content):
    return hashlib.blake2b(content, digest_size=5).digest()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("version", [4, 5])
def test_an_older_file_loads_and_is_verified(folder, version):
    expected = DiTTransformer2DModel.from_pretrained(folder).state_dict()
    write_as(folder, version, blake)
    found = DiTTransformer2DModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    flip(folder / WEIGHTS)
    with pytest.raises(BadInput, match=r"found tensor .* altered since it was saved"):
        DiTTransformer2DModel.from_pretrained(folder)


def test_a_new_file_has_checksums(folder):
    flip(folder / WEIGHTS)
    with pytest.raises(BadInput, match=r"found tensor .* altered since it was saved"):
        DiTTransformer2DModel.from_pretrained(folder)


def test_hashes_of_another_version_do_not_fit(folder):
    write_as(folder, 6, blake)
    with pytest.raises(BadInput, match=r"found tensor .* altered since it was saved"):
        DiTTransformer2DModel.from_pretrained(folder)
