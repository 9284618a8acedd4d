"""Tiny random pipelines of many kinds: from pictures, with controls, of videos, of other families.

Each builder gets a folder for its tokenizer. `MORE` says how each is called. Random embeddings
take the place of text encoders that cannot be made tiny.
"""

from pathlib import Path
from typing import Any

import diffusers
import tiny
import torch
from PIL import Image
from tiny_pipelines import clip, clip_tokenizer, t5, t5_tokenizer, vae
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

SIDE = 16  # pixels along each side of a picture


def lively(model: nn.Module) -> nn.Module:
    """The model in eval mode, without parameters that are zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.abs().sum():
                parameter.normal_(0, 0.05)
    return model.eval()


def seeded(kind: type, **config: object) -> Any:
    torch.manual_seed(0)
    return lively(kind(**config))


def picture(shade: int = 0, side: int = SIDE) -> Image.Image:
    """Stripes."""
    image = Image.new("RGB", (side, side), (40, 90 + shade, 200))
    for row in range(0, side, 4):
        for column in range(side):
            image.putpixel((column, row), (250, shade, 10 * column % 255))
    return image


def mask() -> Image.Image:
    image = Image.new("L", (SIDE, SIDE), 0)
    image.paste(255, (4, 4, 12, 12))
    return image


def embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stable_parts(folder: Path, unet: nn.Module | None = None) -> dict[str, Any]:
    return {
        "vae": vae(),
        "text_encoder": clip(),
        "tokenizer": clip_tokenizer(folder),
        "unet": unet or tiny.model("unet-text"),
        "scheduler": diffusers.DDIMScheduler(),
    }


NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def text_to_image(folder: Path):
    return diffusers.StableDiffusionPipeline(**stable_parts(folder), **NO_CHECKER)


def img2img(folder: Path):
    return diffusers.StableDiffusionImg2ImgPipeline(**stable_parts(folder), **NO_CHECKER)


def inpaint4(folder: Path):
    return diffusers.StableDiffusionInpaintPipeline(**stable_parts(folder), **NO_CHECKER)


def inpaint9(folder: Path):
    torch.manual_seed(0)
    unet = lively(tiny.unet_condition(in_channels=9))
    return diffusers.StableDiffusionInpaintPipeline(**stable_parts(folder, unet), **NO_CHECKER)


def control_net(folder: Path):
    parts = stable_parts(folder)
    torch.manual_seed(0)
    control = diffusers.ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(8, 16)
    )
    return diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=lively(control), **NO_CHECKER
    )


def upscale(folder: Path):
    torch.manual_seed(0)
    unet = lively(tiny.unet_condition(in_channels=7, num_class_embeds=1000))
    return diffusers.StableDiffusionUpscalePipeline(
        **stable_parts(folder, unet), low_res_scheduler=diffusers.DDPMScheduler()
    )


def lcm(folder: Path):
    torch.manual_seed(0)
    unet = lively(tiny.unet_condition(time_cond_proj_dim=32))
    parts = stable_parts(folder, unet) | {"scheduler": diffusers.LCMScheduler()}
    return diffusers.LatentConsistencyModelPipeline(**parts, **NO_CHECKER)


def ip_adapter(folder: Path):
    """Stable Diffusion with the weights of an IP-Adapter, which reads embeddings of 32 values."""
    pipe = text_to_image(folder)
    add_ip_adapter(pipe.unet)
    return pipe


def add_ip_adapter(unet: Any) -> None:
    keys = {}
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        keys[f"{number}.to_k_ip.weight"] = embeddings(width, 32, seed=number) / 6
        keys[f"{number}.to_v_ip.weight"] = embeddings(width, 32, seed=number + 1) / 6
        number += 2
    projection = {
        "proj.weight": embeddings(4 * 32, 32) / 6,
        "proj.bias": torch.zeros(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])


def animate_diff(folder: Path):
    torch.manual_seed(0)
    channels = (16, 32)
    motion = diffusers.MotionAdapter(
        block_out_channels=channels,
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )
    return diffusers.AnimateDiffPipeline(
        **stable_parts(folder, lively(tiny.unet_condition(attention_head_dim=2))),
        motion_adapter=lively(motion),
    )


def text_to_video(folder: Path):
    torch.manual_seed(0)
    unet = diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return diffusers.TextToVideoSDPipeline(**stable_parts(folder, lively(unet)))


def wan(folder: Path):
    transformer = seeded(
        diffusers.WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    decoder = seeded(
        diffusers.AutoencoderKLWan, base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1
    )
    return diffusers.WanPipeline(
        t5_tokenizer(), t5(), decoder, diffusers.FlowMatchEulerDiscreteScheduler(), transformer
    )


def cog_video(folder: Path):
    transformer = seeded(
        diffusers.CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
    )
    decoder = seeded(
        diffusers.AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return diffusers.CogVideoXPipeline(
        t5_tokenizer(), t5(), decoder, transformer, diffusers.CogVideoXDDIMScheduler()
    )


def sana(folder: Path):
    transformer = seeded(
        diffusers.SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
    )
    decoder = seeded(
        diffusers.AutoencoderDC,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    return diffusers.SanaPipeline(
        t5_tokenizer(), t5(), decoder, transformer, diffusers.FlowMatchEulerDiscreteScheduler()
    )


def aura_flow(folder: Path):
    transformer = seeded(
        diffusers.AuraFlowTransformer2DModel,
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        t5_tokenizer(), t5(), vae(), transformer, diffusers.FlowMatchEulerDiscreteScheduler()
    )


def lumina2(folder: Path):
    transformer = seeded(
        diffusers.Lumina2Transformer2DModel,
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 16, 16),
        cap_feat_dim=32,
    )
    return diffusers.Lumina2Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.0),
        t5(),
        t5_tokenizer(),
    )


def qwen_image(folder: Path):
    transformer = seeded(
        diffusers.QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    )
    decoder = seeded(
        diffusers.AutoencoderKLQwenImage,
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return diffusers.QwenImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), decoder, t5(), t5_tokenizer(), transformer
    )


def z_image(folder: Path):
    transformer = seeded(
        diffusers.ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.0),
        t5(),
        t5_tokenizer(),
        transformer,
    )


def chroma(folder: Path):
    transformer = seeded(
        diffusers.ChromaTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return diffusers.ChromaPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.0),
        t5(),
        t5_tokenizer(),
        transformer,
    )


def hunyuan_dit(folder: Path):
    transformer = seeded(
        diffusers.HunyuanDiT2DModel,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=32,
        text_len=77,
        text_len_t5=256,
    )
    torch.manual_seed(0)
    words = folder / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(chr, range(97, 123))]))
    config = BertConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=37,
        max_position_embeddings=128,
    )
    return diffusers.HunyuanDiTPipeline(
        vae(),
        BertModel(config).eval(),
        BertTokenizer(str(words)),
        transformer,
        diffusers.DDPMScheduler(),
        **NO_CHECKER,
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )
