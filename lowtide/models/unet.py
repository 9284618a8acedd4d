"""UNets of diffusers: DDPM and LDM, Stable Diffusion 1 and 2, SDXL, class-conditional."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from lowtide.models.adapter import Architecture

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")


def height_width(size: int | tuple[int, int] | None) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size or (64, 64))


def floats(model: nn.Module, *shape: int) -> torch.Tensor:
    parameter = next(model.parameters())
    return torch.randn(shape, device=parameter.device, dtype=parameter.dtype)


def timesteps(model: nn.Module, batch: int) -> torch.Tensor:
    return torch.arange(batch, device=next(model.parameters()).device)


def unet_example(model: nn.Module, batch: int) -> dict[str, Any]:
    config = model.config
    inputs: dict[str, Any] = {
        "sample": floats(model, batch, config.in_channels, *height_width(config.sample_size)),
        "timestep": timesteps(model, batch),
    }
    if model.class_embedding is not None:
        inputs["class_labels"] = timesteps(model, batch) % (config.num_class_embeds or 1)
    return inputs | {"return_dict": False}


def condition_example(model: nn.Module, batch: int) -> dict[str, Any]:
    config = model.config
    width = config.cross_attention_dim
    inputs = unet_example(model, batch)
    inputs["encoder_hidden_states"] = floats(
        model, batch, 77, width if isinstance(width, int) else width[0]
    )
    if config.addition_embed_type == "text_time":
        times = 6
        text = config.projection_class_embeddings_input_dim - times * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": floats(model, batch, text),
            "time_ids": floats(model, batch, times),
        }
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = floats(model, batch, config.time_cond_proj_dim)
    return inputs


ARCHITECTURES: dict[type[nn.Module], Architecture] = {
    UNet2DModel: Architecture(BLOCKS, unet_example),
    UNet2DConditionModel: Architecture(BLOCKS, condition_example),
}
