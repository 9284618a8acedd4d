"""What diffusers promises of a quantized model: counts, copies, pickles, saving, dequantizing."""

import copy
import json
import pickle

import pytest
import tiny
import tiny_pipelines
import torch

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.nn.attention import QuantAttention, set_unrounded
from lowtide.nn.packed import PackedConv2d, PackedLinear

OPTIONS = {"steps": 2, "images": 2}
KINDS = {"unet2d": "minmax", "dit": "minmax", "per-step": "tfmq"}


def pipeline(kind, folder):
    if kind == "dit":
        return tiny_pipelines.dit(folder)
    return sampling.as_pipeline(tiny.model("unet2d" if kind == "per-step" else kind))


@pytest.fixture(scope="module", params=KINDS)
def packed(request, tmp_path_factory):
    kind = request.param
    options = OPTIONS | ({"iters": 1, "calibration_steps": 1} if kind == "per-step" else {})
    options |= {"labels": (0, 1)} if kind == "dit" else {}
    pipe = pipeline(kind, tmp_path_factory.mktemp(kind))
    return lowtide.quantize(pipe, method=KINDS[kind], **options)


@pytest.fixture(scope="module")
def floating(packed):
    return type(packed.model).from_config(dict(packed.model.config))


@torch.no_grad()
def answer(model, timestep=None):
    torch.manual_seed(0)
    if timestep is None:
        timestep = model.lowtide_clock.timesteps[:1].cpu()
    size = model.config.sample_size
    sample = torch.randn(1, model.config.in_channels, size, size)
    labelled = model.config.get("num_class_embeds") or model.config.get("num_embeds_ada_norm")
    labels = {"class_labels": torch.tensor([1])} if labelled else {}
    device = next(model.parameters()).device
    return model(sample.to(device), timestep, **labels)[0].cpu()


def test_the_number_of_parameters_is_the_float_models(packed, floating):
    assert packed.model.num_parameters() == floating.num_parameters()
    without = floating.num_parameters(exclude_embeddings=True)
    assert packed.model.num_parameters(exclude_embeddings=True) == without
    assert packed.model.num_parameters(only_trainable=True) == 0


def test_the_memory_footprint_is_that_of_codes(packed, floating):
    footprint = packed.model.get_memory_footprint()
    assert footprint < 0.65 * floating.get_memory_footprint()
    assert footprint >= packed.report["account"]["total"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_answer_alike_and_stand_alone(packed, copied):
    expected = answer(packed.model)
    twin = copied(packed.model)
    assert torch.equal(answer(twin), expected)
    assert twin.num_parameters() == packed.model.num_parameters()
    next(twin.parameters()).data.zero_()
    assert torch.equal(answer(packed.model), expected)
    assert twin.hf_quantizer.plan == packed.plan
    assert twin.lowtide_clock is not packed.model.lowtide_clock


def test_pickles_of_torch(packed, tmp_path):
    torch.save(packed.model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(answer(again), answer(packed.model))


def test_the_config_says_how_it_is_quantized(packed):
    config = packed.model.config["quantization_config"]
    for text in (config.to_json_string(), json.dumps(config.to_dict()), repr(config)):
        assert '"weights": 4' in text
        assert "pip install lowtide" in text
    assert type(config).from_dict(config.to_dict()) == config
    assert json.loads(config.to_json_string())["method"] == packed.plan.method


def test_only_safetensors_can_hold_a_plan(packed, tmp_path):
    with pytest.raises(BadInput, match="found safe_serialization=False; expected safetensors"):
        packed.model.save_pretrained(tmp_path, safe_serialization=False)


@pytest.mark.parametrize("options", [{"variant": "int4"}, {"max_shard_size": "30KB"}])
def test_variants_and_shards(packed, tmp_path, options):
    packed.model.save_pretrained(tmp_path, **options)
    variant = options.get("variant")
    again = type(packed.model).from_pretrained(tmp_path, variant=variant)
    assert torch.equal(answer(again), answer(packed.model))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in options)


def test_dequantized_layers_have_the_rounded_weights(packed, tmp_path):
    twin = copy.deepcopy(packed.model)
    if packed.plan.cached or packed.plan.corrected:
        with pytest.raises(BadInput, match="tables in the place of temporal layers"):
            twin.dequantize()
        return
    expected = weights_only_answer(packed.model)
    plain = twin.dequantize()
    assert plain is twin
    assert not any(isinstance(each, PackedLinear | PackedConv2d) for each in plain.modules())
    assert not hasattr(plain, "hf_quantizer")
    assert "quantization_config" not in plain.config
    found = answer(plain, packed.model.lowtide_clock.timesteps[:1])
    assert (found - expected).norm() < 1e-5 * expected.norm()
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert torch.equal(answer(again, packed.model.lowtide_clock.timesteps[:1]), found)
    assert plain.num_parameters() == again.num_parameters()
    floating = type(plain).from_config(dict(plain.config))
    assert again.state_dict().keys() == floating.state_dict().keys()


def weights_only_answer(model):
    """The answer of the packed layers with inputs in float."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(module, PackedLinear | PackedConv2d):
            module.input.format = None
            module.spec[3] = 0
        if isinstance(getattr(module, "processor", None), QuantAttention):
            set_unrounded(module)
    with lowtide.unfused(twin):
        return answer(twin)


def test_the_dequantize_of_the_default_method_is_one_sentence():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    best = lowtide.quantize(pipe, iters=1, calibration_steps=1, **OPTIONS)
    with pytest.raises(BadInput, match="quantize with --method minmax and dequantize that"):
        best.model.dequantize()
    assert answer(best.model).isfinite().all()
