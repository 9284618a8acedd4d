"""zoo:emoji, a miniature Stable Diffusion that draws 64 x 64 emoji from text.

Every part is an ordinary class of diffusers or transformers. Two models are trained:

- `emoji-vae`, a small autoencoder. It starts from the weights of TAEF2 without TAEF2's pooling
  branches, which diffusers' AutoencoderTiny does not have, and learns to do without them.
- `emoji`, the denoiser together with its text encoder, on the latents of TAEF2.
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
from training.batches import device, random_flags, random_indices
from training.objective import noise_loss
from training.phases import TrainingPhase
from training.task import sample_images

NOTO = "1,379 Noto Color Emoji (SIL OFL 1.1) with their names"
MAX_TOKENS = 16
PROMPT_DROPOUT = 0.1
SPECIAL_TOKENS = {"pad": "<pad>", "unk": "<unk>", "bos": "<start>", "eos": "<end>"}
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
PROMPTS_SHOWN = (
    "rocket", "red apple", "sleepy face", "cat face", "pizza", "tiger face", "guitar", "sunflower",
    "snowman", "octopus", "penguin", "airplane", "heart", "star", "birthday cake", "crown",
)  # fmt: skip


def emoji(data: Path) -> tuple[Tensor, list[str]]:
    """Images in [-1, 1], (n, 3, 64, 64), and their names."""
    arrays = np.load(data / "emoji64" / "emoji64.npz")
    images = torch.from_numpy(arrays["x"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, [str(name).lower() for name in arrays["names"]]


def taef2(data: Path, *, pools: bool) -> AutoencoderTiny:
    """TAEF2 in diffusers' class, which lacks its pooling branches; `pools` adds them."""
    vae = AutoencoderTiny(latent_channels=32, scaling_factor=1.0)
    state = taef2_state(data)
    if pools:
        for name in {name.partition(".pool.")[0] for name in state if ".pool." in name}:
            add_pooling_branch(vae.get_submodule(name))
    else:
        state = {name: tensor for name, tensor in state.items() if ".pool." not in name}
    vae.load_state_dict(state)
    return vae.eval()


def taef2_state(data: Path) -> dict[str, Tensor]:
    """TAEF2's weights under the names of diffusers' AutoencoderTiny."""
    encoder = load_file(data / "taef2" / "taef2_encoder.safetensors")
    decoder = load_file(data / "taef2" / "taef2_decoder.safetensors")
    state = {f"encoder.layers.{name}": tensor.float() for name, tensor in encoder.items()}
    # The decoder's file counts from 1: its layer 0 is a clamp, which diffusers applies elsewhere.
    for name, tensor in decoder.items():
        layer, _, rest = name.partition(".")
        state[f"decoder.layers.{int(layer) - 1}.{rest}"] = tensor.float()
    return state


def add_pooling_branch(block: nn.Module) -> None:
    block.pool = nn.Sequential(
        nn.Conv2d(64, 256, 1, bias=False),
        nn.GroupNorm(4, 256),
        nn.ReLU(),
        nn.Conv2d(256, 64, 1, bias=False),
    )
    block.register_forward_pre_hook(lambda module, args: (args[0] + module.pool(args[0]),))


@torch.no_grad()
def taef2_latents(data: Path, images: Tensor) -> Tensor:
    """TAEF2's latents, with its pooling branches: (n, 32, 8, 8). Both models learn from them."""
    vae = taef2(data, pools=True)
    return torch.cat([vae.encode(part).latents for part in images.split(64)])


class EmojiAutoencoder:
    """TAEF2 without its pooling branches.

    It learns to produce the same latents and to reconstruct emoji from them.
    """

    data = NOTO
    shown = ""

    def __init__(self, data: Path):
        images, _ = emoji(data)
        self.parts = nn.ModuleDict({"vae": taef2(data, pools=False)})
        self.images = images.to(device())
        self.latents = taef2_latents(data, images).to(device())

    def loss(
        self,
        parts: nn.ModuleDict,
        generator: torch.Generator,
        batch: int,
        phase: TrainingPhase,
    ) -> Tensor:
        indices = random_indices(self.images, generator, batch)
        images = self.images[indices]
        latents = self.latents[indices]
        with torch.autocast(generator.device.type, torch.bfloat16):
            decoded = parts["vae"].decode(latents).sample
            encoded = parts["vae"].encode(images).latents
        return F.mse_loss(decoded.float(), images) + 0.05 * F.mse_loss(encoded.float(), latents)

    def pipeline(self, parts: nn.ModuleDict) -> AutoencoderTiny:
        return parts["vae"]

    @torch.no_grad()
    def samples(self, vae: AutoencoderTiny) -> np.ndarray:
        """Emoji after encoding and decoding: (64, 64, 64, 3), 0 to 1."""
        images = self.images[:: len(self.images) // 64][:64]
        decoded = vae.decode(vae.encode(images).latents).sample
        return (decoded.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()


def vocabulary_of(names: list[str]) -> dict[str, int]:
    """The special tokens, all letters and digits, and the whole words of the names.

    A letter stands once within a word and once at the end of a word.
    """
    words = set()
    for name in names:
        words.update(re.findall(r"\w+|[^\w\s]", name))
    tokens = list(SPECIAL_TOKENS.values())
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789":
        tokens += [letter, f"{letter}</w>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for word in sorted(words):
        vocabulary.setdefault(word, len(vocabulary))
    return vocabulary


def tokenizer_of(names: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the whole words of the emoji's names."""
    vocabulary = vocabulary_of(names)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()],
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[(token, vocabulary[token]) for token in ("<start>", "<end>")],
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        **{f"{role}_token": token for role, token in SPECIAL_TOKENS.items()},
    )


def text_encoder_for(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def denoiser() -> UNet2DConditionModel:
    """About 9.5 M parameters on latents of 32 x 8 x 8: two levels, both with cross-attention."""
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
    """Text to emoji: the denoiser and its text encoder learn together, on precomputed latents."""

    data = NOTO
    shown = f"Four of each, row by row: {', '.join(PROMPTS_SHOWN)}."

    def __init__(self, data: Path):
        images, self.names = emoji(data)
        latents = taef2_latents(data, images)
        self.scale = round(1 / latents.std().item(), 4)
        self.latents = (latents * self.scale).to(device())
        self.tokenizer = tokenizer_of(self.names)
        self.noising = DDPMScheduler(**NOISE_SCHEDULE)
        unet = denoiser()
        text_encoder = text_encoder_for(self.tokenizer)
        self.parts = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})

    def tokens(self, names: list[str]) -> Tensor:
        """Token ids: (len(names), MAX_TOKENS)."""
        encoding = self.tokenizer(
            names,
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        return encoding.input_ids.to(device())

    def loss(
        self,
        parts: nn.ModuleDict,
        generator: torch.Generator,
        batch: int,
        phase: TrainingPhase,
    ) -> Tensor:
        indices = random_indices(self.latents, generator, batch)
        dropped = random_flags(PROMPT_DROPOUT, generator, batch)
        pairs = zip(indices.tolist(), dropped.tolist(), strict=True)
        names = ["" if drop else self.names[index] for index, drop in pairs]
        text = parts["text_encoder"](self.tokens(names))[0]

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return parts["unet"](noisy, timesteps, encoder_hidden_states=text).sample

        return noise_loss(predict, self.latents[indices], generator, self.noising, phase)

    def pipeline(self, parts: nn.ModuleDict) -> StableDiffusionPipeline:
        vae = AutoencoderTiny.from_pretrained(zoo.folder("emoji-vae"), dtype=torch.float32).eval()
        vae.register_to_config(scaling_factor=self.scale)
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=parts["text_encoder"],
            tokenizer=self.tokenizer,
            unet=parts["unet"],
            scheduler=DDIMScheduler(
                **NOISE_SCHEDULE,
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def samples(self, pipe: StableDiffusionPipeline) -> np.ndarray:
        """Four images of each prompt."""
        prompts = [PROMPTS_SHOWN[index // 4] for index in range(64)]
        return sample_images(pipe, 64, prompt=prompts, guidance_scale=4.0)
