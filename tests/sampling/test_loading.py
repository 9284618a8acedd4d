"""Loading: folders, hub ids, bare models; damage is one sentence; the libraries print nothing."""

import logging
import warnings

import diffusers
import pytest
import tiny
import torch
import transformers
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline
from huggingface_hub.utils import are_progress_bars_disabled

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput

LIBRARIES = (diffusers.utils.logging, transformers.utils.logging)


def saved(folder):
    DDIMPipeline(tiny.model("unet2d").half(), DDIMScheduler()).save_pretrained(folder)
    return folder


def test_half_precision_weights_are_loaded_as_float32(tmp_path):
    assert sampling.load_pipeline(saved(tmp_path)).unet.dtype == torch.float32
    assert sampling.load_pipeline(tmp_path / "unet").unet.dtype == torch.float32
    assert sampling.load_pipeline(tmp_path, torch.bfloat16).unet.dtype == torch.bfloat16


def test_a_pipeline_of_whatever_a_user_passes(tmp_path):
    pipe = DDIMPipeline(tiny.model("unet2d"), DDIMScheduler())
    assert sampling.as_pipeline(pipe) is pipe
    assert type(sampling.as_pipeline(pipe.unet)) is DDIMPipeline
    assert type(sampling.as_pipeline(str(saved(tmp_path)))) is DDIMPipeline


def test_a_bare_transformer_needs_its_pipeline():
    with pytest.raises(BadInput, match="bare DiTTransformer2DModel"):
        lowtide.quantize(tiny.model("dit"))


@pytest.mark.parametrize("text", ["{oops", "[]", "{}", '{"_class_name": 5}'])
def test_a_config_that_names_no_model(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match="found no model"):
        sampling.load_pipeline(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "no JSON", '{"_class_name": 5}', "\0\0"])
def test_an_index_that_names_no_pipeline(text, tmp_path):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(BadInput, match=r"found a model_index\.json in .* that names no pipeline"):
        sampling.load_pipeline(tmp_path)


def test_an_index_that_is_no_text(tmp_path):
    (tmp_path / "model_index.json").write_bytes('{"_class_name": "DDIMPipeline"}'.encode("utf-16"))
    with pytest.raises(BadInput, match=r"found a model_index\.json in .* that names no pipeline"):
        sampling.load_pipeline(tmp_path)


def test_an_index_that_is_a_folder(tmp_path):
    (tmp_path / "model_index.json").mkdir()
    with pytest.raises(BadInput, match=r"found a model_index\.json in .* that names no pipeline"):
        sampling.load_pipeline(tmp_path)


def test_an_index_that_names_an_unknown_class(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(
        BadInput, match=r"found the unknown pipeline NoSuchPipeline in .* diffusers"
    ):
        sampling.load_pipeline(tmp_path)


def test_an_index_that_names_no_pipeline_class(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(BadInput, match="unreadable"):
        sampling.load_pipeline(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": "NoSuchPipeline"}'])
def test_a_damaged_index_on_the_hub(text, tmp_path, monkeypatch):
    """A broken model_index.json of a hub model is one sentence, as one on disk is."""
    (tmp_path / "model_index.json").write_text(text)
    monkeypatch.setattr(
        DiffusionPipeline,
        "download",
        lambda name: DiffusionPipeline.from_pretrained(tmp_path),
    )
    with pytest.raises(BadInput, match="found some/model unreadable"):
        sampling.load_pipeline("some/model")


def test_weights_that_are_cut_short_or_gone(tmp_path):
    weights = saved(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadInput, match="unreadable"):
        sampling.load_pipeline(tmp_path)
    weights.unlink()
    with pytest.raises(BadInput, match="unreadable"):
        sampling.load_pipeline(tmp_path)


def test_a_place_without_a_model(tmp_path):
    with pytest.raises(BadInput, match="found no folder"):
        sampling.load_pipeline(tmp_path / "nothing")
    with pytest.raises(BadInput, match="found a bare AutoencoderKL"):
        (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
        sampling.load_pipeline(tmp_path)


def state() -> list:
    return [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in LIBRARIES]


def test_loading_prints_nothing(tmp_path, capfd):
    """An unexpected attribute in a config makes diffusers warn, and parts make it draw a bar."""
    config = saved(tmp_path) / "unet" / "config.json"
    config.write_text(config.read_text().replace("{", '{"surprise": 1,', 1))
    DiffusionPipeline.from_pretrained(tmp_path)
    assert "Loading pipeline components" in capfd.readouterr().err
    before = (state(), are_progress_bars_disabled())
    sampling.load_pipeline(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (state(), are_progress_bars_disabled()) == before


def test_the_libraries_are_quiet_within_the_context_alone(capfd):
    before = (state(), are_progress_bars_disabled())
    with pytest.raises(KeyError), sampling.quiet_libraries():
        assert state() == [(logging.ERROR, False)] * 2
        warnings.warn("an old option", FutureWarning, stacklevel=1)
        raise KeyError
    with sampling.quiet_libraries(progress_bars=True):
        assert state() == [(logging.ERROR, enabled) for _, enabled in before[0]]
    assert (state(), are_progress_bars_disabled()) == before
    assert capfd.readouterr() == ("", "")
