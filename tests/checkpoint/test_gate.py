"""Whatever is wrong with a folder of ours is one sentence, through plain diffusers too."""

import json
import shutil

import pytest
import tiny_pipelines
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import lowtide
from lowtide.checkpoint import folder_locks, gate, seal
from lowtide.checkpoint.belonging import name_weights
from lowtide.checkpoint.file_format import metadata, read_metadata
from lowtide.checkpoint.folders import written_beside
from lowtide.checkpoint.manifest import MANIFEST, listed, write_manifest
from lowtide.errors import BadInput
from lowtide.nn.plan import Plan

VAE = "vae/diffusion_pytorch_model.safetensors"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FIELDS = ["layers_per_block", "cross_attention_dim", "sample_size", "norm_num_groups"]
ENCODER = "text_encoder/model.safetensors"
LOADS = pytest.mark.parametrize("load", [lowtide.load, DiffusionPipeline.from_pretrained])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("gate")
    pipe = tiny_pipelines.stable_diffusion(home)
    result = lowtide.quantize(pipe, method="minmax", steps=2, images=1, prompts=("a",))
    return result.save(home / "packed")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def rehash(folder):
    write_manifest(folder, [name for name in listed(folder) if name != MANIFEST])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@LOADS
def test_a_flipped_bit_of_a_float_component(folder, load):
    path = folder / VAE
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match=f"found {VAE} in .* altered since lowtide wrote it"):
        load(folder)
    with pytest.raises(BadInput, match=VAE):
        AutoencoderKL.from_pretrained(folder / "vae")
    assert isinstance(lowtide.load(folder, verify="off"), DiffusionPipeline)


@LOADS
def test_packed_weights_in_the_place_of_a_text_encoder(folder, load):
    """transformers would leave its encoder without weights, and diffusers has no gate there."""
    shutil.copyfile(folder / WEIGHTS, folder / ENCODER)
    with pytest.raises(BadInput, match=f"found {ENCODER} in .* altered since lowtide wrote it"):
        load(folder)


@LOADS
def test_whole_weights_of_another_model(folder, load, tmp_path):
    """Each of their hashes fits; the list of the folder's files knows the others."""
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    other = lowtide.quantize(pipe, method="minmax", steps=2, images=1, prompts=("a",))
    shutil.copyfile(other.save(tmp_path / "other") / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(BadInput, match=f"found {WEIGHTS} in .* altered since"):
        load(folder)


@LOADS
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
def test_a_file_that_is_no_json(folder, load, text, name):
    (folder / name).write_text(text)
    with pytest.raises(BadInput, match=name.rpartition("/")[2]):
        load(folder)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("size", [2**60, 100_000, "x", -1])
def test_sizes_that_no_machine_has_are_refused_before_they_are_built(folder, field, size):
    """Their hashes are right."""
    edit(folder / "unet" / "config.json", **{field: size})
    seal.finish(folder)
    rehash(folder)
    if field == "sample_size" and size == 100_000:
        return  # says only how large pictures are by default
    with pytest.raises(BadInput, match=r"config\.json"):
        UNet2DConditionModel.from_pretrained(folder / "unet")


@pytest.mark.parametrize("steps", [0, 10**9, 2**60, "x", None])
def test_a_scheduler_is_within_bounds(folder, steps):
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=steps)
    rehash(folder)
    with pytest.raises(BadInput, match=f"num_train_timesteps is {steps}"):
        DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(BadInput, match="num_train_timesteps"):
        DDIMScheduler.from_pretrained(folder, subfolder="scheduler")


def test_an_index_names_files_beside_it(folder, tmp_path):
    """A file elsewhere is not read, though it is there and the hashes are right."""
    home = folder / "unet"
    name = "diffusion_pytorch_model.safetensors"
    outside = shutil.move(home / name, tmp_path / name)
    tensors = load_file(outside)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, f"../../{name}")}
    (home / f"{name}.index.json").write_text(json.dumps(index))
    write_manifest(folder, {*listed(folder), f"unet/{name}.index.json"} - {WEIGHTS, MANIFEST})
    with pytest.raises(BadInput, match=r"is in '../../diffusion_pytorch_model.safetensors', which"):
        DiffusionPipeline.from_pretrained(folder)


def test_values_whose_hashes_are_right(folder):
    path = folder / WEIGHTS
    header = read_metadata(path)
    state = load_file(path)
    state["lowtide_clock.scale"][0] = -1
    plan = Plan.from_json(header["lowtide_plan"])
    save_file(state, path, header | metadata(plan, state))
    name_weights(path.parent)
    seal.finish(folder)
    rehash(folder)
    with pytest.raises(BadInput, match=r"scale of its input is not positive"):
        DiffusionPipeline.from_pretrained(folder)
    lowtide.load(folder, verify="fast")


def test_a_float_model_elsewhere_and_wrong_options_are_left_to_diffusers(folder, tmp_path):
    tiny_pipelines.ddim(tmp_path).save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "unet" / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON"):
        DiffusionPipeline.from_pretrained(tmp_path / "float")
    with pytest.raises(BadInput, match=r"cannot be loaded .*device_map"):
        DiffusionPipeline.from_pretrained(folder, device_map=5)


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(folder, tmp_path, monkeypatch):
    """Where folders cannot be locked."""
    monkeypatch.setattr(folder_locks.fcntl, "flock", lambda *args: None)
    shutil.copytree(folder, tmp_path / "new")
    reads: list[int] = []
    check = gate.check_index

    def replacing(home):
        check(home)
        reads.append(1)
        if len(reads) == 1:
            with written_beside(folder) as fresh:
                shutil.copytree(tmp_path / "new", fresh, dirs_exist_ok=True)
                (fresh / MANIFEST).unlink()

    monkeypatch.setattr(gate, "check_index", replacing)
    assert isinstance(DiffusionPipeline.from_pretrained(folder), DiffusionPipeline)
    assert len(reads) == 2
