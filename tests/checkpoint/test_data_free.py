"""LowtideConfig given to from_pretrained on a float model: it is quantized while it loads."""

import shutil

import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    PipelineQuantizationConfig,
    UNet2DConditionModel,
)

import lowtide
from lowtide import LowtideConfig, runtime
from lowtide.errors import BadInput
from lowtide.formats import OwnRange
from lowtide.kernels import onednn
from lowtide.models import ARCHITECTURES
from lowtide.nn.clock import Clock
from lowtide.nn.packed import PackedConv2d, PackedLinear, packed_twin
from lowtide.nn.quantized import quantized_layer
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import packed_layers
from lowtide.runtime.own_range_layer import onednn_product
from lowtide.stages.assign import weight_format
from lowtide.stages.fit_weights import fit_weight

KINDS = ("unet2d", "unet-class", "unet-text", "dit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model of each kind in a folder of its own."""
    home = tmp_path_factory.mktemp("float")
    for kind in KINDS:
        tiny.model(kind).eval().save_pretrained(home / kind)
    return home


def loaded(folders, kind, config=None, **options):
    return type(tiny.model(kind)).from_pretrained(
        folders / kind, quantization_config=config, **options
    )


def inputs_of(model):
    """The inputs of a call of a float model, random where they are floats."""
    torch.manual_seed(0)
    example = next(ARCHITECTURES[each] for each in type(model).__mro__ if each in ARCHITECTURES)
    return {
        name: torch.randn_like(each) if getattr(each, "ndim", 0) > 1 else each
        for name, each in example.example(model, 2).items()
    }


@torch.no_grad()
def answer(model, inputs):
    return model(**inputs)[0]


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("weights", "inputs", "most"), [(8, 8, 0.04), (4, 8, 0.4), (8, 16, 0.02), (4, 32, 0.4)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_near_the_float_model(folders, kind, weights, inputs, most):
    model = loaded(folders, kind, LowtideConfig(weights=weights, inputs=inputs))
    layers = dict(packed_layers(model))
    floating = loaded(folders, kind)
    sample = inputs_of(floating)
    products = [each for each in floating.modules() if isinstance(each, torch.nn.Linear)]
    assert len(layers) >= len(products)
    distance = error(answer(model, sample), answer(floating, sample))
    assert 0 < distance < most
    inner = [layer for layer in layers.values() if layer.format.bits == weights]
    assert len(inner) >= len(layers) - 2
    formats = [layer.input.format for layer in layers.values()]
    assert sum(form is None for form in formats) == (2 if inputs == 8 else len(formats))


def test_rows_and_samples_have_ranges_of_their_own(folders):
    model = loaded(folders, "unet-text", LowtideConfig())
    for layer in dict(packed_layers(model)).values():
        axes = 3 if isinstance(layer, PackedConv2d) else 1
        assert layer.input.format in (None, OwnRange(8, axes))
    x = torch.randn(2, 3, 5) * torch.tensor([1.0, 100.0]).reshape(2, 1, 1)
    rounded = OwnRange(8).round(x)
    assert error(rounded[0], x[0]) < 0.01  # a range for all rows would give 0.3
    assert torch.equal(OwnRange(8).round(x[:1]), rounded[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_loaded_bit_for_bit(folders, tmp_path, dtype):
    config = LowtideConfig(weights=4, inputs=8, group=16, modules_to_not_convert=["mid_block"])
    model = loaded(folders, "unet2d", config, torch_dtype=dtype)
    model.save_pretrained(tmp_path / "whole")
    again = type(model).from_pretrained(tmp_path / "whole", torch_dtype=dtype)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert again.config["quantization_config"] == model.hf_quantizer.quantization_config
    sample = torch.randn(1, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(again(sample, 5)[0], model(sample, 5)[0])


def test_shards_are_packed_one_by_one(folders, tmp_path):
    floating = loaded(folders, "unet2d")
    floating.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded = type(floating).from_pretrained(
        tmp_path / "sharded", quantization_config=LowtideConfig(weights=4)
    )
    whole = loaded(folders, "unet2d", LowtideConfig(weights=4)).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in sharded.state_dict().items())


def test_named_modules_stay_in_float(folders):
    config = LowtideConfig(modules_to_not_convert=["mid_block", "conv_out"])
    model = loaded(folders, "unet2d", config)
    floating = loaded(folders, "unet2d").state_dict()
    names = [name for name in floating if name.startswith(("mid_block", "conv_out"))]
    assert all(torch.equal(model.state_dict()[name], floating[name]) for name in names)
    assert not isinstance(model.conv_out, PackedConv2d)
    assert isinstance(model.conv_in, PackedConv2d)
    saved = model.config["quantization_config"].to_dict()
    assert saved["modules_to_not_convert"] == ["mid_block", "conv_out"]
    with pytest.raises(BadInput, match="'mid' in modules_to_not_convert, which names no layer"):
        loaded(folders, "unet2d", LowtideConfig(modules_to_not_convert=["mid"]))


def test_quantize_says_in_the_folder_what_stays_in_float(folders, tmp_path):
    pipe = DDIMPipeline(loaded(folders, "unet2d"), tiny_pipelines.DDIMScheduler())
    options = {"method": "minmax", "steps": 2, "images": 2}
    quantized = lowtide.quantize(pipe, keep_float=["conv_out"], **options)
    again = lowtide.load(quantized.save(tmp_path / "x")).unet
    assert again.config["quantization_config"].modules_to_not_convert == ["conv_out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weights": 9}, "weights 9"), ({"inputs": 0}, "inputs 0"), ({"weights": 16}, "16 bits")],
)
def test_other_bits_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        LowtideConfig(**options)


def test_a_weight_that_is_no_number(folders, tmp_path):
    floating = loaded(folders, "unet2d")
    floating.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    floating.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"NaN or infinity in conv_in\.weight"):
        type(floating).from_pretrained(tmp_path, quantization_config=LowtideConfig())


def test_a_pipeline_takes_it_for_some_of_its_parts(folders, tmp_path):
    DDIMPipeline(loaded(folders, "unet2d"), tiny_pipelines.DDIMScheduler()).save_pretrained(
        tmp_path
    )
    config = PipelineQuantizationConfig(quant_mapping={"unet": LowtideConfig(weights=4)})
    pipe = DDIMPipeline.from_pretrained(tmp_path, quantization_config=config)
    alone = loaded(folders, "unet2d", LowtideConfig(weights=4)).state_dict()
    assert all(torch.equal(each, alone[name]) for name, each in pipe.unet.state_dict().items())
    lowtide.save(pipe, tmp_path / "packed")
    again = lowtide.load(tmp_path / "packed")
    pipe.set_progress_bar_config(disable=True)
    drawn = [
        each(num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        for each in (pipe, again)
    ]
    assert (drawn[0] == drawn[1]).all()


def test_a_model_that_is_no_denoiser(tmp_path):
    torch.manual_seed(0)
    decoder = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).eval()
    decoder.save_pretrained(tmp_path / "float")
    with pytest.warns(UserWarning, match="does not know AutoencoderKL"):
        packed = AutoencoderKL.from_pretrained(
            tmp_path / "float", quantization_config=LowtideConfig()
        )
    packed.save_pretrained(tmp_path / "packed")
    again = AutoencoderKL.from_pretrained(tmp_path / "packed")
    latent = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        images = [model.decode(latent)[0] for model in (decoder, packed, again)]
    assert torch.equal(images[1], images[2])
    assert 0 < error(images[1], images[0]) < 0.05


def test_the_kernel_of_each_layer_is_named(folders):
    kernels = runtime.kernels_of(loaded(folders, "unet2d", LowtideConfig()))
    reason = "its inputs have ranges of their own, and our kernels take one for all of them"
    runs = "plain torch" if onednn.unsupported() else "oneDNN"
    assert kernels["mid_block.resnets.0.conv1"] == f"{runs}: {reason}"
    assert "its inputs are in float" in kernels["conv_in"]


LAYERS = {
    "linear": (lambda: torch.nn.Linear(37, 12), (4, 37)),
    "tokens": (lambda: torch.nn.Linear(40, 12, bias=False), (3, 5, 40)),
    "conv": (lambda: torch.nn.Conv2d(9, 12, 3, padding=1), (2, 9, 6, 6)),
    "strided": (lambda: torch.nn.Conv2d(8, 12, 3, stride=2, padding=(2, 1)), (1, 8, 7, 6)),
    "grouped": (lambda: torch.nn.Conv2d(9, 12, 3, padding=1, groups=3), (2, 9, 6, 6)),
}


@pytest.mark.skipif(onednn.unsupported() != "", reason=onednn.unsupported())
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_onednn_agrees_with_the_operator(kind, group):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    x = torch.randn(shape) * torch.rand(shape[0], *[1] * (len(shape) - 1)) + 0.3
    layer = make()
    axes = 3 if isinstance(layer, torch.nn.Conv2d) else 1
    inputs = Quantizer(OwnRange(8, axes), Clock(()))
    quantized = quantized_layer(layer, weight_format(4, group), inputs)
    fit_weight(quantized, "mse")
    packed: PackedLinear | PackedConv2d = packed_twin(quantized)
    expected = packed(x)
    found = onednn_product(packed)(x)
    assert found is not None
    assert found.shape == expected.shape
    assert error(found, expected) < 2e-6
    assert onednn_product(packed)(x.fill_(float("nan"))) is None


def test_a_single_file_is_quantized_as_it_loads(folders, tmp_path):
    shutil.copytree(folders / "unet-text", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    config = LowtideConfig(weights=4, inputs=8, modules_to_not_convert=["conv_out"])
    place = {"config": str(tmp_path), "subfolder": "unet", "local_files_only": True}
    model = UNet2DConditionModel.from_single_file(str(file), quantization_config=config, **place)
    expected = loaded(folders, "unet-text", config)
    sample = inputs_of(loaded(folders, "unet-text"))
    assert len(dict(packed_layers(model))) == len(dict(packed_layers(expected))) > 20
    assert torch.equal(answer(model, sample), answer(expected, sample))
    model.save_pretrained(tmp_path / "packed")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "packed")
    assert torch.equal(answer(again, sample), answer(model, sample))
