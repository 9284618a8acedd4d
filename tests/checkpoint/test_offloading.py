"""Offloading, casting and placing of a packed model answer like the model where it was."""

import copy

import pretend_device
import pytest
import tiny
import tiny_pipelines
import torch
from accelerate import cpu_offload, dispatch_model
from diffusers.hooks import apply_group_offloading

import lowtide
from lowtide import sampling

OPTIONS = {"steps": 2, "images": 2}
KINDS = {"unet2d": "minmax", "best": "best", "dit": "minmax", "own range": ""}


@pytest.fixture(autouse=True)
def device():
    with pretend_device.present() as found:
        yield found


def quantized(kind, folder):
    if kind == "own range":
        tiny.model("unet2d").save_pretrained(folder)
        config = lowtide.LowtideConfig()
        return type(tiny.model("unet2d")).from_pretrained(folder, quantization_config=config)
    learning = {"iters": 1, "calibration_steps": 1} if kind == "best" else {}
    if kind == "dit":
        pipe = tiny_pipelines.dit(folder)
        return lowtide.quantize(pipe, method="minmax", labels=(0, 1), **OPTIONS).model
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    return lowtide.quantize(pipe, method=KINDS[kind], **OPTIONS, **learning).model


@pytest.fixture(scope="module", params=KINDS)
def packed(request, tmp_path_factory):
    """A packed model and its answer, layer by layer. Tests change copies of it alone."""
    model = quantized(request.param, tmp_path_factory.mktemp("model")).eval()
    with lowtide.unfused(model):
        return model, answer(model, torch.device("cpu"))


@torch.no_grad()
def answer(model, place):
    torch.manual_seed(0)
    timesteps = model.lowtide_clock.timesteps
    timestep = int(timesteps[0]) if timesteps.numel() and not timesteps.is_meta else 5
    size = model.config.sample_size
    sample = torch.randn(1, model.config.in_channels, size, size)
    labels = {}
    if model.config.get("num_embeds_ada_norm"):
        labels = {"class_labels": torch.tensor([1], device=place)}
    return model(sample.to(place), torch.tensor([timestep], device=place), **labels)[0].cpu()


def close(found, expected):
    return (found - expected).norm() <= 1e-5 * expected.norm()


def test_sequential_offload(packed, device):
    model, expected = packed
    twin = copy.deepcopy(model)
    cpu_offload(twin, device, offload_buffers=False)
    weights = [each for name, each in twin.named_parameters() if name.endswith("weight")]
    assert all(each.is_meta for each in weights)
    for _ in range(2):
        assert close(answer(twin, device), expected)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("called", [False, True])
def test_group_offload(packed, kind, called):
    """From the CPU to the CPU: torch cannot give a parameter's data to the pretend device."""
    model, expected = packed
    twin = copy.deepcopy(model)
    place = torch.device("cpu")
    if called:  # the kernels hold the weights in their own order then
        answer(twin, place)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    options = {"onload_device": place, "offload_device": place}
    apply_group_offloading(twin, offload_type=kind, **options, **blocks)
    for _ in range(2):
        assert close(answer(twin, place), expected)


def test_a_map_of_devices(packed, device):
    model, expected = packed
    twin = copy.deepcopy(model)
    parts = {name: 0 for name, _ in twin.named_children()}
    places = parts | {next(iter(parts)): 1}
    places = {name: torch.device("pretend", index) for name, index in places.items()}
    dispatch_model(twin, places, main_device=torch.device("pretend", 0), force_hooks=True)
    assert close(answer(twin, device), expected)


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_a_pipeline_offloads(device, offload):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    lowtide.quantize(pipe, method="minmax", **OPTIONS)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        noise = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=2, generator=noise, output_type="np").images

    with lowtide.unfused(pipe):
        expected = draw()
    getattr(pipe, offload)(device=device)
    for _ in range(2):
        assert abs(draw() - expected).max() < 1e-4


def test_layerwise_casting_changes_float_layers_alone(packed):
    model, expected = packed
    twin = copy.deepcopy(model)
    twin.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    found = answer(twin, torch.device("cpu"))
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    codes = twin.state_dict()
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            assert torch.equal(codes[name], tensor)
