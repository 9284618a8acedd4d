"""Folders that diffusers writes: config.json names the weights that belong to it."""

import json
import shutil
from types import SimpleNamespace

import lora_files
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DConditionModel

import lowtide
from lowtide.checkpoint.file_format import verifying
from lowtide.errors import BadInput

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = lowtide.LowtideConfig(weights=8, inputs=16)
OTHERS = "found weights of another model in"


def packed(kind, home, seed):
    tiny.model(kind, seed).save_pretrained(home)
    loader = type(tiny.model(kind))
    return loader.from_pretrained(home, quantization_config=CONFIG)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two packed models of the same shape."""
    home = tmp_path_factory.mktemp("float")
    return [packed("dit", home / str(seed), seed) for seed in (0, 1)]


def saved(models, home, **options):
    for number, model in enumerate(models):
        model.save_pretrained(home / str(number), **options)
    return home / "0", home / "1"


def loaded(folder, **options):
    return DiTTransformer2DModel.from_pretrained(folder, **options)


def seals(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["seals"]


def check_same(model, again):
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(state[name], each) for name, each in again.state_dict().items())


def test_weights_of_another_model_are_refused(models, tmp_path):
    first, second = saved(models, tmp_path)
    assert seals(first) != seals(second)
    check_same(models[0], loaded(first))
    shutil.copy(second / WEIGHTS, first / WEIGHTS)
    with pytest.raises(BadInput, match=OTHERS):
        loaded(first)
    with verifying("fast"), pytest.raises(BadInput, match=OTHERS):
        loaded(first)
    with verifying("off"):
        check_same(models[1], loaded(first))
    shutil.copy(second / "config.json", first / "config.json")
    check_same(models[1], loaded(first))


def test_shards_of_another_model_are_refused(models, tmp_path):
    first, second = saved(models, tmp_path, max_shard_size="40KB")
    shards = sorted(path.name for path in first.glob("*.safetensors"))
    assert len(shards) > 2 and len(seals(first)) == 1
    check_same(models[0], loaded(first))
    for name in shards:
        shutil.copy(second / name, first / name)
    with pytest.raises(BadInput, match=OTHERS):
        loaded(first)


def test_variants_stand_beside_each_other(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    models[1].save_pretrained(tmp_path, variant="other")
    assert len(seals(tmp_path)) == 2
    check_same(models[0], loaded(tmp_path))
    check_same(models[1], loaded(tmp_path, variant="other"))


def test_a_folder_without_seals_loads_as_before(models, tmp_path):
    first, second = saved(models, tmp_path)
    config = json.loads((first / "config.json").read_text())
    del config["quantization_config"]["seals"]
    (first / "config.json").write_text(json.dumps(config))
    shutil.copy(second / WEIGHTS, first / WEIGHTS)
    check_same(models[1], loaded(first))


@pytest.mark.parametrize("seals", ["ab", 5, {"a": 1}, [5], ["ab"]])
def test_seals_that_are_none_are_one_sentence(models, tmp_path, seals):
    first, _ = saved(models, tmp_path)
    config = json.loads((first / "config.json").read_text())
    config["quantization_config"]["seals"] = seals
    (first / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"with seals|of another model"):
        loaded(first)


def test_a_loaded_model_that_changes_gets_a_seal_of_its_own(models, tmp_path):
    """In another type, and over the folder that it came from."""
    first, _ = saved(models, tmp_path)
    before = seals(first)
    model = loaded(first, torch_dtype=torch.bfloat16)
    assert not model.config.quantization_config.seals
    model.save_pretrained(first)
    assert seals(first) != before
    check_same(model, loaded(first, torch_dtype=torch.bfloat16))


def test_a_fused_lora_changes_the_seal(tmp_path):
    pytest.importorskip("peft")
    model = packed("unet-text", tmp_path / "float", 0)
    model.save_pretrained(tmp_path / "plain")
    state = lora_files.peft_layout(lora_files.random_lora(tiny.model("unet-text")))
    model.load_lora_adapter(state, prefix="unet")
    model.fuse_lora()
    model.save_pretrained(tmp_path / "fused")
    assert seals(tmp_path / "plain") != seals(tmp_path / "fused")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "fused")
    again.save_pretrained(tmp_path / "again")
    assert seals(tmp_path / "again") == seals(tmp_path / "fused")
    shutil.copy(tmp_path / "plain" / WEIGHTS, tmp_path / "fused" / WEIGHTS)
    with pytest.raises(BadInput, match=OTHERS):
        UNet2DConditionModel.from_pretrained(tmp_path / "fused")


def test_other_steps_change_the_seal(tmp_path):
    without = ("reconstruct", "learnranges", "stepaware")
    result = lowtide.quantize(
        "zoo:digits", method="ptqd", without=without, steps=3, images=1, iters=1
    )
    result.pipe.save_pretrained(tmp_path / "first")
    changed = lowtide.reschedule(result, 4)
    changed.pipe.save_pretrained(tmp_path / "second")
    assert seals(tmp_path / "first" / "unet") != seals(tmp_path / "second" / "unet")
    again = DiffusionPipeline.from_pretrained(tmp_path / "second")
    check_same(changed.pipe.unet, again.unet)


def test_only_the_process_that_writes_names_weights(models, tmp_path):
    models[0].save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "config.json").exists()


def test_a_pushed_model_has_its_seal(models, tmp_path, monkeypatch):
    """diffusers uploads the folder while save_pretrained still runs."""
    uploaded = []

    def upload(**kwargs):
        uploaded.append(json.loads((tmp_path / "config.json").read_text()))

    hub = "diffusers.models.modeling_utils."
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload)
    monkeypatch.setattr(f"{hub}create_repo", lambda *_, **__: SimpleNamespace(repo_id="a"))
    monkeypatch.setattr(f"{hub}load_or_create_model_card", lambda *_, **__: None)
    monkeypatch.setattr(f"{hub}populate_model_card", lambda card: SimpleNamespace(save=print))
    models[0].save_pretrained(str(tmp_path), push_to_hub=True)
    assert [each["quantization_config"]["seals"] for each in uploaded] == [seals(tmp_path)]
