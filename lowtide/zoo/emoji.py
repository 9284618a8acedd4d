"""zoo:emoji, a miniature Stable Diffusion: text to 64 x 64 emoji, every part of it an ordinary diffusers or transformers class.

Two models are trained: `emoji-vae`, a small autoencoder that starts from TAEF2's weights (its pooling branches, which
diffusers' AutoencoderTiny does not have, are learnt away), then `emoji`, the denoiser together with its text encoder, on
the latents of that autoencoder.
"""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from lowtide import zoo
from lowtide.zoo.noise import Leg, chosen, device, happens, noise_loss
from lowtide.zoo.pixels import drawn

NOTO = "1,379 Noto Color Emoji (SIL OFL 1.1) with their names"
WORDS = 16
DROPPED = 0.1
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHOWN = (
    "rocket", "red apple", "sleepy face", "cat face", "pizza", "tiger face", "guitar", "sunflower",
    "snowman", "octopus", "penguin", "airplane", "heart", "star", "birthday cake", "crown",
)  # fmt: skip


def emoji(data: Path) -> tuple[Tensor, list[str]]:
    """Images in [-1, 1] and names."""
    found = np.load(data / "emoji64" / "emoji64.npz")
    images = torch.from_numpy(found["x"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, [str(name).lower() for name in found["names"]]


def taef2(data: Path, pools: bool) -> AutoencoderTiny:
    """TAEF2 in diffusers' class. It has pooling branches that the class lacks: with `pools` they are grafted on."""
    vae = AutoencoderTiny(latent_channels=32, scaling_factor=1.0)
    files = {part: load_file(data / "taef2" / f"taef2_{part}.safetensors") for part in ("encoder", "decoder")}
    # The decoder's file counts from 1: its layer 0 is a clamp that diffusers does elsewhere.
    state = {f"encoder.layers.{name}": tensor.float() for name, tensor in files["encoder"].items()}
    for name, tensor in files["decoder"].items():
        place, _, rest = name.partition(".")
        state[f"decoder.layers.{int(place) - 1}.{rest}"] = tensor.float()
    if pools:
        for name in {name.partition(".pool.")[0] for name in state if ".pool." in name}:
            graft_pool(vae.get_submodule(name))
    vae.load_state_dict({name: tensor for name, tensor in state.items() if pools or ".pool." not in name})
    return vae.eval()


def graft_pool(block: nn.Module) -> None:
    block.pool = nn.Sequential(
        nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(4, 256), nn.ReLU(), nn.Conv2d(256, 64, 1, bias=False)
    )
    block.register_forward_pre_hook(lambda module, args: (args[0] + module.pool(args[0]),))


@torch.no_grad()
def taef2_latents(data: Path, images: Tensor) -> Tensor:
    """What TAEF2 itself, pooling and all, makes of the images: both models learn from these."""
    whole = taef2(data, pools=True)
    return torch.cat([whole.encode(part).latents for part in images.split(64)])


class EmojiAutoencoder:
    """TAEF2 without its pooling branches, taught to give the same latents and to draw emoji from them."""

    data = NOTO
    shown = ""

    def __init__(self, data: Path):
        images, _ = emoji(data)
        self.parts = nn.ModuleDict({"vae": taef2(data, pools=False)})
        self.images, self.latents = images.to(device()), taef2_latents(data, images).to(device())

    def loss(self, parts: nn.ModuleDict, draw: torch.Generator, batch: int, leg: Leg) -> Tensor:
        places = chosen(self.images, draw, batch)
        images, latents = self.images[places], self.latents[places]
        with torch.autocast(draw.device.type, torch.bfloat16):
            redrawn, given = parts["vae"].decode(latents).sample, parts["vae"].encode(images).latents
        return F.mse_loss(redrawn.float(), images) + 0.05 * F.mse_loss(given.float(), latents)

    def pipeline(self, parts: nn.ModuleDict) -> AutoencoderTiny:
        return parts["vae"]

    @torch.no_grad()
    def samples(self, vae: AutoencoderTiny) -> np.ndarray:
        """Emoji as they come out of the autoencoder."""
        again = vae.decode(vae.encode(self.images[:: len(self.images) // 64][:64]).latents).sample
        return (again.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()


def tokenizer_of(names: list[str]) -> PreTrainedTokenizerFast:
    """Whole words of the emoji's names, and their letters for words that no name has."""
    words = sorted({word for name in names for word in re.findall(r"\w+|[^\w\s]", name)})
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for end in ("", "</w>")]
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<unk>", "<start>", "<end>", *letters])}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    ends = [("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    tokenizer.decoder = decoders.WordPiece()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=WORDS, **special)


def text_encoder_for(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    ids = {
        name: tokenizer.convert_tokens_to_ids(token) for name, token in (("bos", "<start>"), ("eos", "<end>"), ("pad", "<pad>"))
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=WORDS,
        **{f"{name}_token_id": id for name, id in ids.items()},
    )
    return CLIPTextModel(config)


def denoiser() -> UNet2DConditionModel:
    """About 9.5 M parameters on 32 x 8 x 8 latents: two levels, text read at both."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=32,
        out_channels=32,
        block_out_channels=(96, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
    )


class Emoji:
    """Text to emoji: the denoiser and its text encoder learn together, on latents made once."""

    data = NOTO
    shown = f"Four of each, row by row: {', '.join(SHOWN)}."

    def __init__(self, data: Path):
        images, self.names = emoji(data)
        latents = taef2_latents(data, images)
        self.scale = round(1 / latents.std().item(), 4)
        self.latents = (latents * self.scale).to(device())
        self.tokenizer = tokenizer_of(self.names)
        self.noising = DDPMScheduler(**SCHEDULE)
        self.parts = nn.ModuleDict({"unet": denoiser(), "text_encoder": text_encoder_for(self.tokenizer)})

    def tokens(self, names: list[str]) -> Tensor:
        found = self.tokenizer(names, padding="max_length", max_length=WORDS, truncation=True, return_tensors="pt")
        return found.input_ids.to(device())

    def loss(self, parts: nn.ModuleDict, draw: torch.Generator, batch: int, leg: Leg) -> Tensor:
        places, dropped = chosen(self.latents, draw, batch), happens(DROPPED, draw, batch)
        pairs = zip(places.tolist(), dropped.tolist(), strict=True)
        names = ["" if drop else self.names[place] for place, drop in pairs]
        text = parts["text_encoder"](self.tokens(names))[0]

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return parts["unet"](noisy, timesteps, encoder_hidden_states=text).sample

        return noise_loss(predict, self.latents[places], draw, self.noising, leg)

    def pipeline(self, parts: nn.ModuleDict) -> StableDiffusionPipeline:
        scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        vae = AutoencoderTiny.from_pretrained(zoo.folder("emoji-vae"), dtype=torch.float32).eval()
        vae.register_to_config(scaling_factor=self.scale)
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=parts["text_encoder"],
            tokenizer=self.tokenizer,
            unet=parts["unet"],
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def samples(self, pipe: StableDiffusionPipeline) -> np.ndarray:
        """Four of each of the prompts shown."""
        return drawn(pipe, 64, prompt=[prompt for prompt in SHOWN for _ in range(4)], guidance_scale=4.0)
