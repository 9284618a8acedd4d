"""The model card of a packed folder, what goes to the Hub, and what strangers to lowtide read."""

import importlib
import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import torch
import yaml
from diffusers import DDIMPipeline, UNet2DModel
from diffusers.quantizers import auto
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

import lowtide
from lowtide import sampling
from lowtide.checkpoint import provenance
from lowtide.checkpoint.manifest import MANIFEST
from lowtide.checkpoint.quantization_config import NAME, WORDS
from lowtide.checkpoint.quantized_pipeline import Quantized
from lowtide.errors import BadInput

OPTIONS = {"method": "minmax", "steps": 2, "images": 2}
CARD = """---
license: openrail++
license_name: Open RAIL
---
# A float model
"""


@pytest.fixture(scope="module")
def floating(tmp_path_factory):
    """A folder of a float pipeline, with a card that names its licence."""
    folder = tmp_path_factory.mktemp("home") / "cats"
    lowtide.save(sampling.as_pipeline(tiny.model("unet2d")), folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def quantized(floating):
    return lowtide.quantize(floating, **OPTIONS)


@pytest.fixture(scope="module")
def packed(quantized, tmp_path_factory):
    return quantized.save(tmp_path_factory.mktemp("packed") / "small")


def card_of(folder):
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_the_card_says_what_it_is_and_how_to_load_it(packed, quantized):
    data, text = card_of(packed)
    assert data["library_name"] == "diffusers"
    assert data["base_model_relation"] == "quantized"
    assert data["tags"] == ["lowtide", "quantized", "w4a8"]
    assert (data["license"], data["license_name"]) == ("openrail++", "Open RAIL")
    assert "base_model" not in data  # a folder has no name on the Hub
    assert text.count("# cats in W4A8") == 1
    assert "method `minmax`" in text
    assert f"{quantized.model.num_parameters():,} parameters" in text
    program = text.split("```python\n")[1].split("```")[0]
    assert compile(program, "card", "exec")
    place = {}
    program = program.replace("this folder or repository", str(packed))
    exec(program, place)
    assert place["image"].size == (8, 8)


def test_a_card_on_the_hub_is_accepted(packed):
    data = ModelCard((packed / "README.md").read_text()).data
    assert data.library_name == "diffusers"


def test_the_base_model_of_the_hub_is_named(quantized, tmp_path):
    report = quantized.report | {"source": "someone/cats"}
    folder = Quantized(quantized.pipe, quantized.plan, report).save(tmp_path / "small")
    data, text = card_of(folder)
    assert data["base_model"] == "someone/cats"
    assert "https://huggingface.co/someone/cats" in text
    again = lowtide.save(lowtide.load(folder), tmp_path / "again")
    assert card_of(again)[0] == data


def test_a_float_folder_has_no_card(tmp_path):
    folder = lowtide.save(sampling.as_pipeline(tiny.model("unet2d")), tmp_path / "x")
    assert not (folder / "README.md").exists()


def test_evaluate_works_on_a_folder_saved_from_python_and_fills_the_card(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "small")
    assert provenance.read(folder).settings["steps"] == 2
    evaluation = lowtide.evaluate(folder, seeds=range(2))
    text = card_of(folder)[1]
    assert text.count("## Measured") == 1
    psnr = evaluation.evidence.models["minmax-w4a8"].metrics["psnr"].value
    assert f"{psnr:.1f}" in text
    assert "](lowtide-images.png)" in text
    with Image.open(folder / "lowtide-images.png") as picture:
        assert picture.size == (2 * 12 + 4, 2 * 12 + 4)
        # The upper row is the reference: the report's own image, pixel by pixel.
        shown = np.asarray(picture)[4:12, 4:12]
    expected = evaluation.folder / "images" / evaluation.evidence.reference / "0.png"
    with Image.open(expected) as image:
        assert np.array_equal(shown, np.asarray(image.convert("RGB")))
    lowtide.evaluate(folder, seeds=range(2))
    assert card_of(folder)[1].count("## Measured") == 1
    copied = lowtide.save(lowtide.load(folder), tmp_path / "copy")
    assert card_of(copied)[1].count("](lowtide-images.png)") == 1
    assert (copied / "lowtide-images.png").is_file()
    assert "README.md" in json.loads((folder / "lowtide-files.json").read_text())["files"]


def test_a_source_that_moved_is_asked_for(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "small")
    record = json.loads((folder / "lowtide.json").read_text())
    moved = record | {"source": str(tmp_path / "gone")}
    (folder / "lowtide.json").write_text(json.dumps(moved))
    with pytest.raises(BadInput, match="give its new place with --reference MODEL"):
        lowtide.evaluate(folder, seeds=range(2))
    (folder / "lowtide.json").write_text(json.dumps(record | {"source": ""}))
    with pytest.raises(BadInput, match="give it with --reference MODEL"):
        lowtide.evaluate(folder, seeds=range(2))
    assert lowtide.evaluate(folder, reference=record["source"], seeds=range(2)).folder.is_dir()


def test_push_to_hub_uploads_the_folder_with_its_card(quantized, monkeypatch, tmp_path):
    uploaded = tmp_path / "hub"

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        assert private
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})()

    def upload_folder(self, repo_id, folder_path, commit_message, create_pr):
        shutil.copytree(folder_path, uploaded)
        assert not create_pr
        return f"https://hub.example/{repo_id}/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    address = quantized.push_to_hub("small-cats", private=True)
    assert address == "https://hub.example/me/small-cats/commit/1"
    assert card_of(uploaded)[0]["license"] == "openrail++"
    assert type(lowtide.load(uploaded)) is DDIMPipeline


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one repository: the folder that diffusers uploads to, and the card it finds."""
    place = tmp_path / "hub"
    module = importlib.import_module("diffusers.utils.hub_utils")

    def load(repo_id, token=None):
        if (place / "README.md").is_file():
            return ModelCard((place / "README.md").read_text())
        raise EntryNotFoundError("no card")

    def upload_folder(repo_id, folder_path, **options):
        shutil.copytree(folder_path, place, dirs_exist_ok=True)
        return "https://hub.example/commit/1"

    monkeypatch.setattr(module.ModelCard, "load", load)
    monkeypatch.setattr(module, "upload_folder", upload_folder)
    for name in ("utils.hub_utils", "pipelines.pipeline_utils", "models.modeling_utils"):
        user = importlib.import_module(f"diffusers.{name}")
        monkeypatch.setattr(user, "create_repo", lambda repo_id, **options: Mock(repo_id=repo_id))
    return place


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_diffusers_own_push_uploads_the_same_card(packed, hub, way, tmp_path):
    pipe = DDIMPipeline.from_pretrained(packed)
    if way == "push_to_hub":
        pipe.push_to_hub("me/small-cats")
    else:
        pipe.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="me/small-cats")
    own = lowtide.save(lowtide.load(packed), tmp_path / "own")
    assert (hub / "README.md").read_text() == (own / "README.md").read_text()
    assert card_of(hub)[0]["license"] == "openrail++"
    assert type(lowtide.load(hub)) is DDIMPipeline


def test_diffusers_own_push_of_a_model_alone(packed, hub):
    model = UNet2DModel.from_pretrained(packed / "unet")
    model.push_to_hub("me/small-unet")
    data, text = card_of(hub)
    assert data["tags"] == ["lowtide", "quantized", "w4a8"]
    place = {}
    program = text.split("```python\n")[1].split("```")[0]
    exec(program.replace("this folder or repository", str(hub)), place)
    assert place["model"].num_parameters() == model.num_parameters()


def test_a_card_that_somebody_wrote_stays(packed, hub):
    pipe = DDIMPipeline.from_pretrained(packed)
    hub.mkdir()
    (hub / "README.md").write_text("---\nlicense: mit\n---\n# My cats\n")
    pipe.push_to_hub("me/small-cats")
    assert "# My cats" in (hub / "README.md").read_text()


def test_a_float_pipeline_is_pushed_as_before(floating, hub):
    DDIMPipeline.from_pretrained(floating).push_to_hub("me/cats")
    assert "automatically generated" in (hub / "README.md").read_text()


def test_who_has_no_lowtide_is_told_what_to_install(packed, monkeypatch):
    for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        for name in (NAME, WORDS):
            monkeypatch.delitem(table, name)
    with pytest.raises(ValueError, match=r"got lowtide \(pip install lowtide, then import lowtide"):
        UNet2DModel.from_pretrained(packed / "unet")


def test_a_folder_of_before_is_read(packed, tmp_path):
    """Its config.json has the bare name of the method."""
    folder = shutil.copytree(packed, tmp_path / "old")
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_method"] = "lowtide"
    path.write_text(json.dumps(config))
    (folder / MANIFEST).unlink()
    old, new = (lowtide.load(each).unet.state_dict() for each in (folder, packed))
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())


def test_a_data_free_model_is_evaluated_and_has_a_card(floating, tmp_path):
    pipe = lowtide.load(floating)
    config = lowtide.LowtideConfig()
    pipe.unet = UNet2DModel.from_pretrained(floating / "unet", quantization_config=config)
    folder = lowtide.save(pipe, tmp_path / "free")
    result = lowtide.evaluate(folder, reference=floating, seeds=range(2), steps=2)
    assert result.evidence.models["data-free-w8a8"].psnr > 20
    data, text = card_of(folder)
    assert data["license"] == "openrail++"
    assert "method `data-free`" in text


def test_a_card_without_metadata_is_read_in_silence(tmp_path, monkeypatch):
    float_model = tmp_path / "plain"
    lowtide.save(sampling.as_pipeline(tiny.model("unet2d")), float_model)
    (float_model / "README.md").write_text("# A float model\n")
    result = lowtide.quantize(float_model, **OPTIONS)
    warned: list[str] = []
    monkeypatch.setattr("huggingface_hub.repocard.logger.warning", warned.append)
    folder = result.save(tmp_path / "packed")
    assert warned == []
    assert "license" not in card_of(folder)[0]
