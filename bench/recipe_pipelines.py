"""The pipelines of the recipes with random weights: each paper's architecture, nothing downloaded.

The numbers are those of the published configurations. `tiny` keeps the layout (levels, attentions,
autoencoder, conditions) and makes channels few and images small. Text encoders are small random
ones with the widths that the denoiser reads.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from gpu import networks
from tiny_pipelines import TOKENS, clip_tokenizer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lowtide.sampling.class_embedder import ClassEmbedder
from lowtide.sampling.pipelines import ClassConditionalPipeline, UnconditionalPipeline
from lowtide.workflows.compvis import configs
from lowtide.workflows.compvis.configs import ModelConfig

Json = dict[str, Any]
NOISE: Json = {"timesteps": 1000, "linear_start": 0.0015}
VQ4: Json = {
    "embed_dim": 3,
    "n_embed": 8192,
    "ddconfig": {
        "resolution": 256, "in_channels": 3, "out_ch": 3, "z_channels": 3, "ch": 128,
        "ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [],
    },
}  # fmt: skip
KL8: Json = {
    "embed_dim": 4,
    "ddconfig": {
        "resolution": 256, "in_channels": 3, "out_ch": 3, "z_channels": 4, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
    },
}  # fmt: skip
LDM4: Json = {
    "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 224,
    "attention_resolutions": [8, 4, 2], "num_res_blocks": 2, "channel_mult": [1, 2, 3, 4],
    "num_head_channels": 32,
}  # fmt: skip
LDM8: Json = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 192,
    "attention_resolutions": [1, 2, 4, 8], "num_res_blocks": 2, "channel_mult": [1, 2, 2, 4, 4],
    "num_heads": 8, "use_scale_shift_norm": True, "resblock_updown": True,
}  # fmt: skip
CLASSES: Json = {
    "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 192,
    "attention_resolutions": [8, 4, 2], "num_res_blocks": 2, "channel_mult": [1, 2, 3, 5],
    "num_heads": 1, "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 512,
}  # fmt: skip
CIFAR10: Json = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def _model(unet: Json, autoencoder: Json, end: float, classes: int | None = None) -> ModelConfig:
    return ModelConfig(
        params=NOISE | {"linear_end": end},
        unet=unet,
        autoencoder=autoencoder,
        is_vq="n_embed" in autoencoder,
        classes=classes,
    )


def _smaller(model: ModelConfig) -> ModelConfig:
    """The same layout with few channels and small latents."""
    levels = len(model.unet["channel_mult"])
    changes: Json = {"model_channels": 32, "image_size": 2 ** (levels - 1)}
    if "num_head_channels" in model.unet:
        changes["num_head_channels"] = 8
    if "context_dim" in model.unet:
        changes["context_dim"] = 16
    parts = model.autoencoder["ddconfig"] | {"ch": 32, "num_res_blocks": 1}
    codes = {"n_embed": 16} if model.is_vq else {}
    autoencoder = {**model.autoencoder, **codes, "ddconfig": parts}
    return replace(model, unet={**model.unet, **changes}, autoencoder=autoencoder)


def latent(model: ModelConfig, *, tiny: bool) -> Any:
    """A latent diffusion model of CompVis, as `lowtide convert` makes it."""
    model = _smaller(model) if tiny else model
    kind = UNet2DModel if model.classes is None else UNet2DConditionModel
    unet = kind(**configs.unet_config(model))
    coder = VQModel if model.is_vq else AutoencoderKL
    autoencoder = coder(**configs.autoencoder_config(model, 1.0))
    scheduler = DDIMScheduler(**configs.scheduler_config(model))
    if model.classes is not None:
        embedder = ClassEmbedder(model.classes, model.unet["context_dim"])
        last = model.classes - 1
        return ClassConditionalPipeline(unet, scheduler, last, autoencoder, embedder)
    if configs.head_width(model) is None:
        return UnconditionalPipeline(unet, scheduler, autoencoder, model.unet["num_heads"])
    return LDMPipeline(autoencoder, unet, scheduler)


def cifar10(folder: Path, *, tiny: bool) -> Any:
    small = {"block_out_channels": (32,) * 4, "sample_size": 16} if tiny else {}
    return DDPMPipeline(UNet2DModel(**CIFAR10 | small), DDPMScheduler())


def _stable_vae(*, tiny: bool) -> AutoencoderKL:
    """The autoencoder that Stable Diffusion, SDXL and DiT share."""
    widths = (32,) * 4 if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if tiny else 2,
        latent_channels=4,
    )


def dit(folder: Path, *, tiny: bool) -> Any:
    small = networks.TINY_DIT if tiny else {}
    model = DiTTransformer2DModel(**networks.DIT | small)
    labels = {str(each): str(each) for each in range(1000)}
    return DiTPipeline(model, _stable_vae(tiny=tiny), DDIMScheduler(), labels)


def _text_encoder(width: int, pooled: int | None = None) -> Any:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=TOKENS,
        projection_dim=pooled or width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config) if pooled is None else CLIPTextModelWithProjection(config)


def stable_diffusion(folder: Path, *, tiny: bool) -> Any:
    small = networks.TINY_UNET | {"sample_size": 8} if tiny else {}
    unet = UNet2DConditionModel(**networks.UNETS["sd15"] | small)
    return StableDiffusionPipeline(
        vae=_stable_vae(tiny=tiny),
        text_encoder=_text_encoder(unet.config["cross_attention_dim"]),
        tokenizer=clip_tokenizer(folder),
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def sdxl(folder: Path, *, tiny: bool) -> Any:
    pooled = 32 if tiny else 1280
    widths = (8, 8) if tiny else (768, 1280)
    times = 8 if tiny else 256
    small: Json = networks.TINY_UNET if tiny else {}
    sizes = {
        "addition_time_embed_dim": times,
        "projection_class_embeddings_input_dim": pooled + 6 * times,
        "cross_attention_dim": sum(widths),
    }
    unet = UNet2DConditionModel(**networks.UNETS["sdxl"] | small | sizes)
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionXLPipeline(
        vae=_stable_vae(tiny=tiny),
        text_encoder=_text_encoder(widths[0]),
        text_encoder_2=_text_encoder(widths[1], pooled),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(),  # pyright: ignore[reportArgumentType]
        add_watermarker=False,
    )


def _of(model: ModelConfig) -> Callable[..., Any]:
    return lambda folder, *, tiny: latent(model, tiny=tiny)


_FOUR = _of(_model(LDM4, VQ4, 0.0195))
# What builds the pipeline of each recipe file.
PIPELINES: dict[str, Callable[..., Any]] = {
    "cifar10-ddim": cifar10,
    "bedrooms-ldm4": _FOUR,
    "celebahq-ldm4": _FOUR,
    "ffhq-ldm4": _FOUR,
    "churches-ldm8": _of(_model(LDM8, KL8, 0.0155)),
    "imagenet-ldm4": _of(_model(CLASSES, VQ4, 0.0195, 1001)),
    "dit-xl2": dit,
    "sd14": stable_diffusion,
    "sdxl": sdxl,
}


def pipeline(recipe: str, folder: Path, *, tiny: bool) -> Any:
    """The pipeline of a recipe; `folder` takes the files of its tokenizer."""
    torch.manual_seed(0)
    pipe = PIPELINES[recipe](folder, tiny=tiny)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
            for parameter in part.parameters():
                if not parameter.any():  # a layer of zeros would hide everything before it
                    nn.init.normal_(parameter, 0, 0.02)
    return pipe
