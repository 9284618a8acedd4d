"""UNets of diffusers: DDPM and LDM, Stable Diffusion 1 and 2, SDXL, class-conditional."""

# diffusers imports its classes lazily and does not declare them as exports.
# pyright: reportPrivateImportUsage=false

from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from lowtide.models.adapter import Architecture, Arguments

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")
TEXT_TOKENS = 77
# SDXL's condition on sizes: original height and width, crop top and left, target height and width.
TIME_IDS = 6


def config_of(model: object) -> Any:
    """The configuration of a diffusers model or pipeline, whose fields are set at run time."""
    return cast(Any, model).config


def height_width(size: int | tuple[int, int] | None) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size or (64, 64)
    return height, width


def floats(model: nn.Module, *shape: int) -> torch.Tensor:
    parameter = next(model.parameters())
    return torch.randn(shape, device=parameter.device, dtype=parameter.dtype)


def timesteps(model: nn.Module, batch: int) -> torch.Tensor:
    return torch.arange(batch, device=next(model.parameters()).device)


def unet_example(model: nn.Module, batch: int) -> Arguments:
    config = config_of(model)
    inputs: Arguments = {
        "sample": floats(model, batch, config.in_channels, *height_width(config.sample_size)),
        "timestep": timesteps(model, batch),
    }
    if model.class_embedding is not None:
        inputs["class_labels"] = timesteps(model, batch) % (config.num_class_embeds or 1)
    return inputs | {"return_dict": False}


def condition_example(model: nn.Module, batch: int) -> Arguments:
    config = config_of(model)
    widths = config.cross_attention_dim
    width = widths if isinstance(widths, int) else widths[0]
    inputs = unet_example(model, batch)
    inputs["encoder_hidden_states"] = floats(model, batch, TEXT_TOKENS, width)
    if config.addition_embed_type == "text_time":
        times = TIME_IDS * config.addition_time_embed_dim
        text = config.projection_class_embeddings_input_dim - times
        inputs["added_cond_kwargs"] = {
            "text_embeds": floats(model, batch, text),
            "time_ids": floats(model, batch, TIME_IDS),
        }
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = floats(model, batch, config.time_cond_proj_dim)
    return inputs


ARCHITECTURES: dict[type[nn.Module], Architecture] = {
    UNet2DModel: Architecture(BLOCKS, unet_example),
    UNet2DConditionModel: Architecture(BLOCKS, condition_example),
}
