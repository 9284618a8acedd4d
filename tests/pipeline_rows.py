"""The rows of docs/works-with.md that are pipelines: how each tiny one is built and quantized."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import more_pipelines as more
import tiny_pipelines
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from more_pipelines import embeddings, mask, picture, seeded
from tiny_pipelines import clip, clip_tokenizer, t5, t5_tokenizer


def movq(**changes: object):
    config = {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "norm_num_groups": 8,
        "norm_type": "spatial",
        "num_vq_embeddings": 12,
        "vq_embed_dim": 4,
    }
    return seeded(diffusers.VQModel, **config | changes)


def kandinsky22(folder: Path):
    unet = seeded(
        diffusers.UNet2DConditionModel,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
    )
    return diffusers.KandinskyV22Pipeline(unet, diffusers.DDPMScheduler(), movq())


def kandinsky3(folder: Path):
    unet = seeded(
        diffusers.Kandinsky3UNet,
        time_embedding_dim=32,
        groups=8,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 32),
        cross_attention_dim=32,
        encoder_hid_dim=32,
    )
    return diffusers.Kandinsky3Pipeline(
        t5_tokenizer(), t5(), unet, diffusers.DDPMScheduler(), movq()
    )


def cascade(folder: Path):
    block = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    unet = seeded(
        diffusers.StableCascadeUNet,
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16, 32),
        num_attention_heads=(1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=(block, block),
        clip_text_pooled_in_channels=32,
        effnet_in_channels=4,
    )
    return diffusers.StableCascadeDecoderPipeline(
        unet,
        clip_tokenizer(folder),
        clip(32, projected=True),
        diffusers.DDPMWuerstchenScheduler(),
        seeded(PaellaVQModel, levels=1, bottleneck_blocks=1, embed_dim=8),
    )


@dataclass(frozen=True)
class Row:
    """A kind of pipeline: its name in the table, how it is built, how it is called.

    call: what `call={...}` gets. fields: of a request, besides the seeds. alone: diffusers cannot
    load the whole pipeline, but its denoiser. drawn: the calls of its denoiser cannot be recorded,
    so what the pipeline draws is compared.
    """

    title: str
    build: Callable[[Path], Any]
    call: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    drawn: bool = False


PROMPTS = {"prompts": ("a b c", "x y z")}
SMALL = PROMPTS | {"size": 16}
VIDEO = SMALL | {}
TEXT = {
    "prompt_embeds": embeddings(2, 6, 32),
    "prompt_embeds_mask": torch.ones(2, 6, dtype=torch.long),
}
Z_TEXT = {
    "prompt_embeds": [embeddings(6, 32), embeddings(6, 32, seed=1)],
    "guidance_scale": 0.0,
}
TWO = {"image_embeds": embeddings(2, 32), "negative_image_embeds": embeddings(2, 32, seed=1)}

ROWS: dict[str, Row] = {
    "unet2d": Row("DDIMPipeline", tiny_pipelines.ddim),
    "sd": Row("StableDiffusionPipeline", more.text_to_image, fields=SMALL),
    "negative": Row(
        "StableDiffusionPipeline, with a negative prompt",
        more.text_to_image,
        {"negative_prompt": "q", "guidance_scale": 4.0},
        SMALL,
    ),
    "img2img": Row(
        "StableDiffusionImg2ImgPipeline",
        more.img2img,
        {"image": picture(), "strength": 0.8},
        PROMPTS,
    ),
    "inpaint4": Row(
        "StableDiffusionInpaintPipeline, 4 channels",
        more.inpaint4,
        {"image": picture(), "mask_image": mask()},
        SMALL,
    ),
    "inpaint9": Row(
        "StableDiffusionInpaintPipeline, 9 channels",
        more.inpaint9,
        {"image": [picture(), picture(60)], "mask_image": mask()},
        SMALL,
    ),
    "controlnet": Row(
        "StableDiffusionControlNetPipeline", more.control_net, {"image": picture()}, SMALL
    ),
    "upscale": Row(
        "StableDiffusionUpscalePipeline", more.upscale, {"image": picture(side=8)}, PROMPTS
    ),
    "lcm": Row("LatentConsistencyModelPipeline", more.lcm, fields=SMALL),
    "animatediff": Row("AnimateDiffPipeline", more.animate_diff, {"num_frames": 3}, VIDEO),
    "unet3d": Row("TextToVideoSDPipeline", more.text_to_video, {"num_frames": 3}, VIDEO),
    "wan": Row("WanPipeline", more.wan, {"num_frames": 9, "max_sequence_length": 16}, VIDEO),
    "cogvideox": Row(
        "CogVideoXPipeline", more.cog_video, {"num_frames": 9, "max_sequence_length": 16}, VIDEO
    ),
    "sana": Row(
        "SanaPipeline",
        more.sana,
        {
            "max_sequence_length": 16,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
        PROMPTS | {"size": 32},
    ),
    "auraflow": Row("AuraFlowPipeline", more.aura_flow, {"max_sequence_length": 16}, SMALL),
    "lumina2": Row("Lumina2Pipeline", more.lumina2, {"max_sequence_length": 16}, SMALL),
    "qwenimage": Row("QwenImagePipeline", more.qwen_image, TEXT, {"size": 16}),
    "zimage": Row("ZImagePipeline", more.z_image, Z_TEXT, {"size": 16}, drawn=True),
    "chroma": Row("ChromaPipeline", more.chroma, {"max_sequence_length": 16}, SMALL),
    "hunyuandit": Row(
        "HunyuanDiTPipeline", more.hunyuan_dit, {"use_resolution_binning": False}, SMALL
    ),
    "kandinsky22": Row("KandinskyV22Pipeline", kandinsky22, TWO, {"size": 64}),
    "kandinsky3": Row("Kandinsky3Pipeline", kandinsky3, fields=SMALL),
    "cascade": Row(
        "StableCascadeDecoderPipeline",
        cascade,
        {"image_embeddings": embeddings(2, 4, 8, 8)},
        PROMPTS,
        alone=True,
        drawn=True,
    ),
}
