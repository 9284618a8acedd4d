"""A tiny zoo: random data in the files' real shapes, models of a few thousand parameters."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMPipeline,
    DDIMScheduler,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image

from lowtide import zoo
from training import dit, emoji, pixels, task
from training.catalogue import ZOO_MODELS
from training.export import model_folder
from training.phases import single_phase

STEPS = 4
BATCH = 4


def write_data(folder: Path) -> None:
    """50 digits, 20 colour images in two strips, 70 emoji."""
    random = np.random.default_rng(0)
    for name in ("mnist", "cifar10", "emoji64"):
        (folder / name).mkdir(parents=True)
    digits = random.integers(0, 256, (50, 28, 28), dtype=np.uint8)
    np.savez(folder / "mnist" / "mnist.npz", train_x=digits, train_y=np.arange(50) % 10)
    for index in range(2):
        strip = random.integers(0, 256, (320, 32, 3), dtype=np.uint8)
        path = folder / "cifar10" / f"train_{index:03}.webp"
        Image.fromarray(strip).save(path, lossless=True)
    images = random.integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)
    names = np.array([f"Thing {index % 7}" for index in range(70)])
    np.savez(folder / "emoji64" / "emoji64.npz", x=images, names=names)


def digits_model(classes: int | None = None) -> UNet2DModel:
    return tiny.unet2d(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        num_class_embeds=classes,
    )


def cifar10_model() -> UNet2DModel:
    return tiny.unet2d(sample_size=32, block_out_channels=(8, 8))


def autoencoder(data: Path | None = None, pools: bool = False) -> AutoencoderTiny:
    torch.manual_seed(int(pools))
    return AutoencoderTiny(
        latent_channels=32,
        scaling_factor=1.0,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )


def transformer() -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        in_channels=32,
        out_channels=32,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return dit.without_label_dropout(model)


def denoiser() -> UNet2DConditionModel:
    return tiny.unet_condition(in_channels=32, out_channels=32, cross_attention_dim=128)


def build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make every model and data set tiny and put the zoo's folders inside `folder`.

    The zoo then holds the two models that others start from. Returns the data folder.
    """
    write_data(folder / "data")
    monkeypatch.setattr(zoo, "PACKAGE", folder / "package")
    monkeypatch.setattr(zoo, "REPOSITORY", folder / "repository")
    monkeypatch.setattr(task, "STEPS", 2)
    monkeypatch.setattr(pixels, "digits_model", digits_model)
    monkeypatch.setattr(pixels, "cifar10_model", cifar10_model)
    monkeypatch.setattr(pixels, "small_cifar10_model", cifar10_model)
    monkeypatch.setattr(emoji, "taef2", autoencoder)
    monkeypatch.setattr(emoji, "denoiser", denoiser)
    monkeypatch.setattr(dit, "transformer", transformer)
    monkeypatch.setattr(dit, "IMAGES", 20)
    phases = single_phase(STEPS, 1e-3, snr_cap=5.0)
    for name, model in ZOO_MODELS.items():
        monkeypatch.setitem(ZOO_MODELS, name, replace(model, phases=phases, batch=BATCH))
    DDIMPipeline(digits_model(), DDIMScheduler()).save_pretrained(model_folder("digits"))
    autoencoder().save_pretrained(model_folder("emoji-vae"))
    return folder / "data"
