"""Full-size public configurations, written down here so that no test needs a network."""

from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

SD = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}

CONFIGS = {
    # google/ddpm-cifar10-32
    "ddpm-cifar10": (
        UNet2DModel,
        {
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "attention_head_dim": None,
            "norm_eps": 1e-6,
        },
    ),
    # CompVis/ldm-celebahq-256
    "ldm-4": (
        UNet2DModel,
        {
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (224, 448, 672, 896),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
            "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
            "attention_head_dim": 32,
        },
    ),
    "sd-1.5": (UNet2DConditionModel, SD),
    "sd-2.1": (
        UNet2DConditionModel,
        SD
        | {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "sample_size": 96,
        },
    ),
    "sdxl": (
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "dit-xl-2": (
        DiTTransformer2DModel,
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": 32,
            "num_embeds_ada_norm": 1000,
        },
    ),
    "pixart-512": (
        PixArtTransformer2DModel,
        {"sample_size": 64, "caption_channels": 4096, "use_additional_conditions": False},
    ),
    "pixart-1024": (PixArtTransformer2DModel, {"sample_size": 128, "caption_channels": 4096}),
    "sd3-medium": (
        SD3Transformer2DModel,
        {
            "sample_size": 128,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
            "pos_embed_max_size": 192,
        },
    ),
    "flux-dev": (FluxTransformer2DModel, {"guidance_embeds": True}),
}
