"""Diffusion transformers of diffusers: DiT, PixArt, SD3, Flux."""

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from lowtide.models.adapter import Architecture
from lowtide.models.unet import floats, timesteps

TOKENS = 16


def latents(model: nn.Module, batch: int) -> torch.Tensor:
    size = model.config.sample_size
    return floats(model, batch, model.config.in_channels, size, size)


def dit_example(model: nn.Module, batch: int) -> dict[str, Any]:
    labels = timesteps(model, batch) % model.config.num_embeds_ada_norm
    inputs = {
        "hidden_states": latents(model, batch),
        "timestep": timesteps(model, batch),
        "class_labels": labels,
    }
    return inputs | {"return_dict": False}


def pixart_example(model: nn.Module, batch: int) -> dict[str, Any]:
    size, added = floats(model, batch, 2), {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        added = {"resolution": size, "aspect_ratio": size[:, :1].clone()}
    return {
        "hidden_states": latents(model, batch),
        "encoder_hidden_states": floats(
            model, batch, TOKENS, model.config.caption_channels or model.inner_dim
        ),
        "timestep": timesteps(model, batch),
        "added_cond_kwargs": added,
        "encoder_attention_mask": torch.ones(batch, TOKENS, device=size.device),
        "return_dict": False,
    }


def sd3_example(model: nn.Module, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(model, batch),
        "encoder_hidden_states": floats(model, batch, TOKENS, model.config.joint_attention_dim),
        "pooled_projections": floats(model, batch, model.config.pooled_projection_dim),
        "timestep": timesteps(model, batch),
        "return_dict": False,
    }


def flux_example(model: nn.Module, batch: int) -> dict[str, Any]:
    inputs = {
        "hidden_states": floats(model, batch, TOKENS, model.config.in_channels),
        "encoder_hidden_states": floats(model, batch, TOKENS, model.config.joint_attention_dim),
        "pooled_projections": floats(model, batch, model.config.pooled_projection_dim),
        "timestep": floats(model, batch).abs(),
        "img_ids": floats(model, TOKENS, 3),
        "txt_ids": floats(model, TOKENS, 3),
        "return_dict": False,
    }
    return inputs | (
        {"guidance": floats(model, batch).abs()} if model.config.guidance_embeds else {}
    )


ARCHITECTURES: dict[type[nn.Module], Architecture] = {
    DiTTransformer2DModel: Architecture(("BasicTransformerBlock",), dit_example),
    PixArtTransformer2DModel: Architecture(("BasicTransformerBlock",), pixart_example),
    SD3Transformer2DModel: Architecture(("JointTransformerBlock",), sd3_example),
    FluxTransformer2DModel: Architecture(
        ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        flux_example,
        1000,
        ("img_ids", "txt_ids"),
    ),
}
