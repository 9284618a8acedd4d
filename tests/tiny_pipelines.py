"""Real diffusers pipelines with tiny random models and tokenizers; nothing is downloaded."""

import json
from pathlib import Path

import tiny
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LDMPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    VQModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

TOKENS = 16


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters only, no merges."""
    letters = [chr(code) for code in range(97, 123)]
    last_letters = [f"{letter}</w>" for letter in letters]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *last_letters]
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    merges = folder / "merges.txt"
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=TOKENS)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    letters = {chr(code): code - 94 for code in range(97, 123)}
    tokenizer = Tokenizer(models.WordLevel(special | letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TOKENS,
    )


def clip(width: int = 32, projected: bool = False):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=32, d_ff=37, num_layers=2, num_heads=2, d_kv=16)
    return T5EncoderModel(config).eval()


def vae(channels: int = 4, **changes):
    torch.manual_seed(0)
    config = {
        "block_out_channels": (16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(latent_channels=channels, norm_num_groups=8, **config | changes).eval()


def ddpm(folder: Path):
    return DDPMPipeline(tiny.model("unet2d"), DDPMScheduler())


def ddim(folder: Path):
    return DDIMPipeline(tiny.model("unet2d"), DDIMScheduler())


def ldm(folder: Path):
    torch.manual_seed(0)
    vq = VQModel(
        block_out_channels=(16,), norm_num_groups=8, latent_channels=3, num_vq_embeddings=16
    ).eval()
    return LDMPipeline(vq, tiny.model("unet2d"), DDIMScheduler())


def dit(folder: Path):
    return DiTPipeline(tiny.model("dit"), vae(), DDIMScheduler())


def stable_diffusion(folder: Path):
    return StableDiffusionPipeline(
        vae(),
        clip(),
        clip_tokenizer(folder),
        tiny.model("unet-text"),
        DDIMScheduler(),
        None,
        None,
        requires_safety_checker=False,
    )


def sdxl(folder: Path):
    pair = (clip(16), clip(16, projected=True))
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionXLPipeline(
        vae(),
        *pair,
        tokenizer,
        tokenizer,
        tiny.model("unet-sdxl"),
        DDIMScheduler(),
        add_watermarker=False,
    )


def pixart(folder: Path):
    return PixArtAlphaPipeline(t5_tokenizer(), t5(), vae(), tiny.model("pixart"), DDIMScheduler())


def sd3(folder: Path):
    tokenizer = clip_tokenizer(folder)
    first = clip(32, projected=True)
    second = clip(32, projected=True)
    return StableDiffusion3Pipeline(
        tiny.model("sd3"),
        FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.0),
        first,
        tokenizer,
        second,
        tokenizer,
        t5(),
        t5_tokenizer(),
    )


def flux(folder: Path):
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.0),
        clip(32),
        clip_tokenizer(folder),
        t5(),
        t5_tokenizer(),
        tiny.model("flux"),
    )


PIPELINES = {
    "ddpm": ddpm,
    "ddim": ddim,
    "ldm": ldm,
    "dit": dit,
    "sd": stable_diffusion,
    "sdxl": sdxl,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
}


def request_fields(name: str) -> dict:
    """The fields of a request that each kind of pipeline needs besides seeds."""
    if name == "dit":
        return {"labels": (1, 3, 7)}
    if name in ("ddpm", "ddim", "ldm"):
        return {}
    return {"prompts": ("a b c", "x y z"), "size": 16}
