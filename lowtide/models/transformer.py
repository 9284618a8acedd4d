"""Diffusion transformers of diffusers: DiT, PixArt, SD3, Flux."""

# diffusers imports its classes lazily and does not declare them as exports.
# pyright: reportPrivateImportUsage=false

from typing import cast

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from lowtide.models.adapter import Architecture, Arguments
from lowtide.models.unet import config_of, floats, timesteps

TOKENS = 16


def latents(model: nn.Module, batch: int) -> torch.Tensor:
    """(batch, channels, size, size)"""
    config = config_of(model)
    return floats(model, batch, config.in_channels, config.sample_size, config.sample_size)


def dit_example(model: nn.Module, batch: int) -> Arguments:
    labels = timesteps(model, batch) % config_of(model).num_embeds_ada_norm
    return {
        "hidden_states": latents(model, batch),
        "timestep": timesteps(model, batch),
        "class_labels": labels,
        "return_dict": False,
    }


def pixart_example(model: nn.Module, batch: int) -> Arguments:
    resolution = floats(model, batch, 2)
    added: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        added = {"resolution": resolution, "aspect_ratio": resolution[:, :1].clone()}
    width = config_of(model).caption_channels or cast(int, model.inner_dim)
    return {
        "hidden_states": latents(model, batch),
        "encoder_hidden_states": floats(model, batch, TOKENS, width),
        "timestep": timesteps(model, batch),
        "added_cond_kwargs": added,
        "encoder_attention_mask": torch.ones(batch, TOKENS, device=resolution.device),
        "return_dict": False,
    }


def sd3_example(model: nn.Module, batch: int) -> Arguments:
    config = config_of(model)
    return {
        "hidden_states": latents(model, batch),
        "encoder_hidden_states": floats(model, batch, TOKENS, config.joint_attention_dim),
        "pooled_projections": floats(model, batch, config.pooled_projection_dim),
        "timestep": timesteps(model, batch),
        "return_dict": False,
    }


def flux_example(model: nn.Module, batch: int) -> Arguments:
    config = config_of(model)
    inputs = {
        "hidden_states": floats(model, batch, TOKENS, config.in_channels),
        "encoder_hidden_states": floats(model, batch, TOKENS, config.joint_attention_dim),
        "pooled_projections": floats(model, batch, config.pooled_projection_dim),
        "timestep": floats(model, batch).abs(),
        "img_ids": floats(model, TOKENS, 3),
        "txt_ids": floats(model, TOKENS, 3),
        "return_dict": False,
    }
    if config.guidance_embeds:
        inputs["guidance"] = floats(model, batch).abs()
    return inputs


ARCHITECTURES: dict[type[nn.Module], Architecture] = {
    DiTTransformer2DModel: Architecture(("BasicTransformerBlock",), dit_example),
    PixArtTransformer2DModel: Architecture(("BasicTransformerBlock",), pixart_example),
    SD3Transformer2DModel: Architecture(("JointTransformerBlock",), sd3_example),
    FluxTransformer2DModel: Architecture(
        blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        example=flux_example,
        ticks=1000,
        shared=("img_ids", "txt_ids"),
    ),
}
