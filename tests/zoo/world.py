"""A small world for the zoo: random data in the files' real shapes, models of a few thousand parameters, empty homes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import tiny
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMPipeline,
    DDIMScheduler,
    DiTTransformer2DModel,
    UNet2DModel,
)
from PIL import Image

from lowtide import zoo
from lowtide.zoo import dit, emoji, pixels, specs
from lowtide.zoo.noise import one_leg

STEPS, BATCH = 4, 4


def write_data(folder: Path) -> None:
    """50 digits, 20 colour images in two strips, 70 emoji."""
    draw = np.random.default_rng(0)
    for name in ("mnist", "cifar10", "emoji64"):
        (folder / name).mkdir(parents=True)
    digits = draw.integers(0, 256, (50, 28, 28), dtype=np.uint8)
    np.savez(folder / "mnist" / "mnist.npz", train_x=digits, train_y=np.arange(50) % 10)
    for strip in range(2):
        pixels_ = draw.integers(0, 256, (320, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels_).save(folder / "cifar10" / f"train_{strip:03}.webp", lossless=True)
    names = np.array([f"Thing {place % 7}" for place in range(70)])
    np.savez(folder / "emoji64" / "emoji64.npz", x=draw.integers(0, 256, (70, 64, 64, 3), dtype=np.uint8), names=names)


def digits_model(classes: int | None = None) -> UNet2DModel:
    shape = {"sample_size": 32, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8)}
    return tiny.unet2d(**shape, num_class_embeds=classes)


def cifar_model() -> UNet2DModel:
    return tiny.unet2d(sample_size=32, block_out_channels=(8, 8))


def autoencoder(data: Path | None = None, pools: bool = False) -> AutoencoderTiny:
    torch.manual_seed(int(pools))
    few = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    return AutoencoderTiny(latent_channels=32, scaling_factor=1.0, **few, **blocks)


def transformer() -> DiTTransformer2DModel:
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    model = DiTTransformer2DModel(in_channels=32, out_channels=32, sample_size=8, patch_size=2, num_embeds_ada_norm=1000, **heads)
    return dit.without_label_dropout(model)


def build(folder: Path, monkeypatch) -> Path:
    """Everything small, the homes inside `folder` and holding what others start from. Returns the data folder."""
    write_data(folder / "data")
    monkeypatch.setattr(zoo, "INSIDE", folder / "inside")
    monkeypatch.setattr(zoo, "BESIDE", folder / "beside")
    condition = {"in_channels": 32, "out_channels": 32, "cross_attention_dim": 128}
    small = {
        pixels: {"digits_model": digits_model, "cifar_model": cifar_model, "small_cifar_model": cifar_model, "STEPS": 2},
        emoji: {"taef2": autoencoder, "denoiser": lambda: tiny.unet_condition(**condition)},
        dit: {"transformer": transformer, "IMAGES": 20},
    }
    for module, changes in small.items():
        for name, change in changes.items():
            monkeypatch.setattr(module, name, change)
    for name, spec in specs.SPECS.items():
        monkeypatch.setitem(specs.SPECS, name, replace(spec, legs=one_leg(STEPS, 1e-3, snr_cap=5.0), batch=BATCH))
    DDIMPipeline(digits_model(), DDIMScheduler()).save_pretrained(zoo.home("digits"))
    autoencoder().save_pretrained(zoo.home("emoji-vae"))
    return folder / "data"
