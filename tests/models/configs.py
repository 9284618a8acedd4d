"""The public full-size configurations, built on the meta device: real names and counts at no cost in memory."""

from collections.abc import Callable

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

STABLE_DIFFUSION = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip


def ddpm_cifar10() -> nn.Module:
    """google/ddpm-cifar10-32."""
    return UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    )  # fmt: skip


def ldm_4() -> nn.Module:
    """CompVis/ldm-celebahq-256."""
    return UNet2DModel(
        sample_size=64, block_out_channels=(224, 448, 672, 896), layers_per_block=2, attention_head_dim=32,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
        up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    )  # fmt: skip


def sd_1_5() -> nn.Module:
    """stable-diffusion-v1-5."""
    return UNet2DConditionModel(**STABLE_DIFFUSION)


def sd_2_1() -> nn.Module:
    """stabilityai/stable-diffusion-2-1: wider text, linear projections."""
    changes = {
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
    }  # fmt: skip
    return UNet2DConditionModel(**STABLE_DIFFUSION | changes)


def sdxl() -> nn.Module:
    """stabilityai/stable-diffusion-xl-base-1.0."""
    return UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def dit_xl() -> nn.Module:
    """facebook/DiT-XL-2-256."""
    return DiTTransformer2DModel(sample_size=32, out_channels=8, num_layers=28, num_attention_heads=16, attention_head_dim=72)


def pixart(size: int, conditions: bool) -> nn.Module:
    """PixArt-alpha/PixArt-XL-2, at 512 or 1024 pixels; the larger reads resolution and aspect ratio too."""
    return PixArtTransformer2DModel(
        sample_size=size, in_channels=4, out_channels=8, num_layers=28, num_attention_heads=16, attention_head_dim=72,
        cross_attention_dim=1152, caption_channels=4096, use_additional_conditions=conditions,
    )  # fmt: skip


def sd3_medium() -> nn.Module:
    """stabilityai/stable-diffusion-3-medium."""
    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )  # fmt: skip


def flux_dev() -> nn.Module:
    """black-forest-labs/FLUX.1-dev."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[], nn.Module]] = {
    "ddpm-cifar10": ddpm_cifar10,
    "ldm-4": ldm_4,
    "sd-1.5": sd_1_5,
    "sd-2.1": sd_2_1,
    "sdxl": sdxl,
    "dit-xl": dit_xl,
    "pixart-512": lambda: pixart(64, False),
    "pixart-1024": lambda: pixart(128, True),
    "sd3-medium": sd3_medium,
    "flux-dev": flux_dev,
}


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return CONFIGS[name]().eval()
