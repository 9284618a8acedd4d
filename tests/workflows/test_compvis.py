"""convert: CompVis' checkpoints, held equal to their networks written plainly."""

import copy
import json

import pytest
import torch
import yaml
from compvis_autoencoder import Autoencoder
from compvis_models import UNet
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from test_cli import assert_one_sentence
from test_cli import lowtide as lowtide_command  # noqa: F401
from torch import nn

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.sampling.pipelines import UnconditionalPipeline
from lowtide.workflows.compvis import convert_to_folder, converted

CLASSES = 5
UNET = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
}
DD = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
TRANSFORMER = {
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 16,
    "num_heads": 2,
}
RESIDUAL = {"use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 16}
KINDS = {
    "class-vq": (TRANSFORMER, True),
    "class-kl": (TRANSFORMER, False),
    "plain-vq": ({"num_head_channels": 32}, True),
    "resampled-kl": (RESIDUAL, False),
    "heads-kl": ({"use_scale_shift_norm": True, "resblock_updown": True, "num_heads": 4}, False),
    "two-blocks": ({"num_head_channels": 16, "num_res_blocks": 2, "channel_mult": [1, 1, 2]}, True),
}


def config_of_kind(kind: str) -> dict:
    changes, is_vq = KINDS[kind]
    target = "VQModelInterface" if is_vq else "AutoencoderKL"
    autoencoder = {"embed_dim": 3, "ddconfig": DD | {"double_z": not is_vq}}
    if is_vq:
        autoencoder["n_embed"] = 16
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "unet_config": {"target": "ldm.UNetModel", "params": UNET | changes},
        "first_stage_config": {"target": f"ldm.{target}", "params": autoencoder},
        "cond_stage_config": "__is_unconditional__",
    }
    if kind.startswith("class"):
        stage = {"embed_dim": 16, "n_classes": CLASSES, "key": "class_label"}
        params["cond_stage_config"] = {"target": "ldm.ClassEmbedder", "params": stage}
    return {"model": {"base_learning_rate": 1e-6, "target": "ldm.LDM", "params": params}}


class Original:
    """The networks of a kind, and the state dict of their checkpoint."""

    def __init__(self, kind: str):
        torch.manual_seed(0)
        self.config = config_of_kind(kind)
        params = self.config["model"]["params"]
        self.unet = UNet(params["unet_config"]["params"]).eval()
        self.autoencoder = Autoencoder(params["first_stage_config"]["params"]).eval()
        self.embedding = nn.Embedding(CLASSES, 16) if kind.startswith("class") else None
        betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
        self.state = {
            **{f"model.diffusion_model.{k}": v for k, v in self.unet.state_dict().items()},
            **{f"first_stage_model.{k}": v for k, v in self.autoencoder.state_dict().items()},
            "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(2),
            "betas": betas,
            "alphas_cumprod": (1 - betas).cumprod(0),
            "scale_factor": torch.tensor(0.5),
        }
        if self.embedding is not None:
            self.state["cond_stage_model.embedding.weight"] = self.embedding.weight.detach()

    def write(self, folder):
        checkpoint = folder / "model.ckpt"
        torch.save({"state_dict": self.state, "global_step": 1}, checkpoint)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(self.config))
        return checkpoint, config


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_converted_networks_answer_as_the_originals(kind, tmp_path):
    original = Original(kind)
    pipe = converted(*original.write(tmp_path))
    x = torch.randn(2, 3, 8, 8)
    t = torch.tensor([3, 700])
    labels = torch.tensor([1, 4])
    if original.embedding is None:
        expected = original.unet(x, t)
        found = pipe.unet(x, t).sample
    else:
        context = original.embedding(labels)[:, None]
        expected = original.unet(x, t, context)
        found = pipe.unet(x, t, **pipe.condition(labels)).sample
    assert apart(found, expected) < 1e-5
    autoencoder = pipe.components.get("vae") or pipe.vqvae
    assert apart(autoencoder.decode(x).sample, original.autoencoder.decode(x)) < 1e-5
    pictures = torch.randn(2, 3, 16, 16)
    encoded = autoencoder.encode(pictures)
    latents = encoded.latents if KINDS[kind][1] else encoded.latent_dist.parameters
    assert apart(latents, original.autoencoder.encode(pictures)) < 1e-5
    assert autoencoder.config.scaling_factor == 0.5


def test_heads_that_are_split_otherwise_would_be_noticed(tmp_path):
    """The mutation that the first test must kill: rows of q, k and v not by head."""
    original = Original("two-blocks")
    pipe = converted(*original.write(tmp_path))
    joint = original.state["model.diffusion_model.middle_block.1.qkv.weight"][:, :, 0]
    q = pipe.unet.mid_block.attentions[0].to_q.weight
    assert not torch.equal(q, joint.chunk(3)[0])
    assert torch.equal(q[:16], joint[:16]) and torch.equal(q[16:32], joint[48:64])


def test_diffusers_converts_what_it_can_alike(tmp_path):
    original = Original("class-kl")
    pipe = converted(*original.write(tmp_path))
    theirs = convert_ldm_unet_checkpoint(original.state, {"layers_per_block": 1})
    ours = pipe.unet.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    blocks = {"down_block_types": [0, 0], "up_block_types": [0, 0]}
    theirs = convert_ldm_vae_checkpoint(original.state, blocks)
    ours = pipe.vae.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_class_conditional_folder_is_sampled_and_quantized(tmp_path):
    original = Original("class-vq")
    result = convert_to_folder(*original.write(tmp_path), tmp_path / "ldm")
    assert result["pipeline"] == "ClassConditionalPipeline" and not result["ema"]
    pipe = lowtide.load(tmp_path / "ldm")
    assert pipe.null_label == CLASSES - 1 and type(pipe.vae).__name__ == "VQModel"
    request = sampling.Request(steps=3, seeds=(1, 2), labels=(0, 3), guidance=3.0)
    images = torch.from_numpy(sampling.images(pipe, request))
    assert apart(images, by_hand(original, (3, 0), 3.0)) < 1e-4
    options = {"labels": (0, 3), "steps": 3, "images": 2, "guidance": 3.0, "iters": 2}
    packed = lowtide.quantize(pipe, method="tfmq", profile="paper", **options)
    drawn = sampling.images(packed.pipe, request)
    again = lowtide.load(packed.save(tmp_path / "packed"))
    assert (sampling.images(again, request) == drawn).all()
    assert 1e-4 < apart(torch.from_numpy(drawn), images) < 1


@torch.no_grad()
def by_hand(original: Original, labels: tuple, scale: float) -> torch.Tensor:
    """latent-diffusion's DDIM with guidance: timesteps from 1, ends at alpha-bar of t = 0."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    x = torch.cat([torch.randn(1, 3, 8, 8, generator=each) for each in generators])
    alphas = original.state["alphas_cumprod"]
    context = original.embedding(torch.tensor(labels))[:, None]
    nothing = original.embedding(torch.tensor([CLASSES - 1] * 2))[:, None]
    timesteps = [667, 334, 1]
    for t, following in zip(timesteps, [334, 1, 0], strict=True):
        times = torch.tensor([t, t])
        without = original.unet(x, times, nothing)
        eps = without + scale * (original.unet(x, times, context) - without)
        x0 = (x - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()
        x = alphas[following].sqrt() * x0 + (1 - alphas[following]).sqrt() * eps
    image = original.autoencoder.decode(x / 0.5)
    return (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def test_an_unconditional_folder_is_diffusers_own(tmp_path):
    original = Original("plain-vq")
    convert_to_folder(*original.write(tmp_path), tmp_path / "ldm")
    assert json.loads((tmp_path / "ldm/model_index.json").read_text())["_class_name"] == (
        "LDMPipeline"
    )
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "ldm")
    assert type(pipe.scheduler) is DDIMScheduler
    images = sampling.images(pipe, sampling.Request(steps=3, seeds=(1,)))
    assert images.shape == (1, 16, 16, 3)


def test_a_number_of_heads_is_kept_in_the_folder_and_in_the_packed_one(tmp_path):
    original = Original("heads-kl")
    convert_to_folder(*original.write(tmp_path), tmp_path / "ldm")
    pipe = lowtide.load(tmp_path / "ldm")
    assert type(pipe) is UnconditionalPipeline and pipe.config.heads == 4
    x = torch.randn(2, 3, 8, 8)
    t = torch.tensor([3, 700])
    with torch.no_grad():
        assert apart(pipe.unet(x, t).sample, original.unet(x, t)) < 1e-5
    packed = lowtide.quantize(pipe, method="tfmq", steps=3, images=2, iters=2)
    request = sampling.Request(steps=3, seeds=(1, 2))
    drawn = sampling.images(packed.pipe, request)
    again = lowtide.load(packed.save(tmp_path / "packed"))
    assert (sampling.images(again, request) == drawn).all()


def test_the_moving_average_is_taken_unless_told_otherwise(tmp_path):
    original = Original("plain-vq")
    averages = {
        f"model_ema.{f'diffusion_model.{name}'.replace('.', '')}": 2 * tensor
        for name, tensor in original.unet.state_dict().items()
    }
    original.state |= averages | {"model_ema.decay": torch.tensor(0.99)}
    places = original.write(tmp_path)
    bias = original.unet.out[2].bias
    assert torch.equal(converted(*places).unet.conv_out.bias, 2 * bias)
    assert torch.equal(converted(*places, ema=False).unet.conv_out.bias, bias)


def without(name):
    return lambda original: original.state.pop(name)


def with_tensor(name):
    return lambda original: original.state.update({name: torch.zeros(3)})


def parameters_of(original) -> dict:
    return original.config["model"]["params"]["unet_config"]["params"]


def with_param(**changes):
    return lambda original: parameters_of(original).update(changes)


WRONG = {
    "a tensor is missing": (
        without("model.diffusion_model.out.2.bias"),
        r"found 1 tensors of the UNet2DModel that do not fit \(first: conv_out.bias, missing\)",
    ),
    "a tensor of the autoencoder is missing": (
        without("first_stage_model.decoder.mid.attn_1.q.weight"),
        "first: decoder.mid_block.attentions.0.to_q.weight, missing",
    ),
    "a tensor is left over": (
        with_tensor("model.diffusion_model.input_blocks.1.0.in_layers.5.weight"),
        "first: down_blocks.0.resnets.0.in_layers.5.weight, left over",
    ),
    "a name that no rule knows": (
        with_tensor("model.diffusion_model.extra.weight"),
        "found the tensor model.diffusion_model.extra.weight, which no rule knows",
    ),
    "a part that no rule knows": (
        with_tensor("control_model.weight"),
        "found the tensor control_model.weight",
    ),
    "another shape": (
        lambda original: original.state.update(
            {"model.diffusion_model.out.2.bias": torch.zeros(7)}
        ),
        r"found conv_out.bias with shape \(7,\); expected \(3,\)",
    ),
    "another schedule": (
        lambda original: original.state.update({"alphas_cumprod": torch.ones(1000)}),
        "found another noise schedule",
    ),
    "neither heads nor their width": (
        lambda original: parameters_of(original).pop("num_head_channels"),
        "found neither num_heads nor num_head_channels",
    ),
    "an unknown option": (with_param(magic=1), "found magic in the UNet's config"),
    "another attention": (
        with_param(use_new_attention_order=True),
        "found use_new_attention_order",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_an_error(wrong, tmp_path):
    change, message = WRONG[wrong]
    original = Original("plain-vq")
    change(original)
    places = original.write(tmp_path)
    with pytest.raises(BadInput, match=message):
        converted(*places)


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


def test_no_code_of_a_checkpoint_is_run(tmp_path, capsys):
    original = Original("plain-vq")
    checkpoint, config = original.write(tmp_path)
    torch.save({"state_dict": copy.copy(original.state), "callbacks": Harmful()}, checkpoint)
    with pytest.raises(BadInput, match="unreadable without running code"):
        convert_to_folder(checkpoint, config, tmp_path / "out")
    assert "this must not run" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


CONFIGS = {
    "empty": (b"", "found no"),
    "null": (b"null", "found no"),
    "binary": (bytes(range(256)), "unreadable"),
    "no yaml": (b"model: [", "unreadable"),
    "no autoencoder": (b"model: {params: {unet_config: {params: {}}}}", "first_stage_config"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_none(name, tmp_path):
    checkpoint, config = Original("plain-vq").write(tmp_path)
    text, message = CONFIGS[name]
    config.write_bytes(text)
    with pytest.raises(BadInput, match=message):
        converted(checkpoint, config)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", bytes(range(256))])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_checkpoint_that_is_none(content, suffix, tmp_path):
    _, config = Original("plain-vq").write(tmp_path)
    path = tmp_path / f"odd.{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="unreadable"):
        converted(path, config)


def test_the_command_line_converts(lowtide_command, tmp_path):  # noqa: F811
    checkpoint, config = Original("class-kl").write(tmp_path)
    out = tmp_path / "out"
    ended = lowtide_command("convert", checkpoint, "--config", config, "--out", out, "--json")
    result = json.loads(ended.out)
    assert ended.code == 0 and result["parts"]["vae"] == "AutoencoderKL"
    assert (out / "model_index.json").exists()
    assert_one_sentence(
        lowtide_command("convert", "nowhere.ckpt", "--config", config, "--out", out)
    )
