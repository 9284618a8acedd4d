"""Denoisers of full size with random weights, and jobs that quantize them.

SD 1.5, SDXL, DiT-XL/2, PixArt-alpha at 1024 and SD3 medium, by their configurations in diffusers.

A job's calibration set is one or a few calls on random inputs, so that no pipeline is needed.
"""

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from rich.console import Console
from torch import nn

from lowtide.models import ARCHITECTURES, Adapter, Arguments, adapt
from lowtide.sampling.drivers import Role
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Call, Job
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.pack import Pack

Json = dict[str, Any]
TIMESTEP = 500
UNETS: dict[str, Json] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TINY_UNET: Json = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 1,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
}
DIT: Json = {
    "sample_size": 32,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
}
TINY_DIT: Json = {"sample_size": 8, "num_attention_heads": 2, "num_layers": 1}
PIXART: Json = {"sample_size": 128, "caption_channels": 4096}
TINY_PIXART: Json = {
    "sample_size": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "cross_attention_dim": 32,
    "caption_channels": 16,
}
SD3: Json = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
TINY_SD3: Json = {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
}
# Each name's class, its configuration, and what makes it tiny.
KINDS: dict[str, tuple[type[nn.Module], Json, Json]] = {
    "sd15": (UNet2DConditionModel, UNETS["sd15"], TINY_UNET),
    "sdxl": (UNet2DConditionModel, UNETS["sdxl"], TINY_UNET),
    "dit-xl-2": (DiTTransformer2DModel, DIT, TINY_DIT),
    "pixart": (PixArtTransformer2DModel, PIXART, TINY_PIXART),
    "sd3": (SD3Transformer2DModel, SD3, TINY_SD3),
}
NAMES = ("sd15", "dit-xl-2", "sdxl")

ROLE = Role(latents=True, prompted=True)  # of networks without a pipeline


def network(
    name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool, **changes: object
) -> nn.Module:
    """The denoiser, made on the device; `changes` are of its configuration."""
    kind, config, small = KINDS[name]
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(**config | (small if tiny else {}) | changes)
    finally:
        torch.set_default_dtype(before)
    model = model.eval().requires_grad_(False)
    # A layer that starts at zero would hide everything before it.
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(0, 0.02)
    is_unet = kind is UNet2DConditionModel
    return model.to(memory_format=torch.channels_last) if is_unet else model


def inputs_of(model: nn.Module, batch: int) -> Arguments:
    """Random inputs of one call, all samples at one timestep."""
    arguments = dict(ARCHITECTURES[type(model)].example(model, batch))
    times = torch.full((batch,), TIMESTEP, device=next(model.parameters()).device)
    return arguments | {"timestep": times}


def job_of(
    model: nn.Module, settings: Settings, calls: int, batch: int, adapter: Adapter | None = None
) -> Job:
    """A job of this model with a calibration set of random calls."""
    arguments = [inputs_of(model, batch) for _ in range(calls)]
    adapter = adapter or adapt(model, arguments[0])
    pipe: Any = None  # Collect alone draws with it, and has no part in this job
    job = Job(
        pipe, model, adapter, settings, "minmax", given_role=ROLE, console=Console(quiet=True)
    )
    job.calls = [Call(TIMESTEP, each, kept=True) for each in arguments]
    return job


def packed(model: nn.Module, weights: int, inputs: int) -> nn.Module:
    """The model, packed in place by minmax over one call."""
    job = job_of(model, Settings(weights=weights, inputs=inputs), calls=1, batch=2)
    for stage in (Assign(), FitWeights("minmax"), FitRanges("minmax"), Pack()):
        stage.run(job)
    return model
