"""zoo:dit, a small diffusion transformer: digits on demand, in the latents of emoji-vae, run by diffusers' DiTPipeline."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from lowtide import zoo
from lowtide.zoo.noise import Leg, device, happens, noise_loss, typical_first
from lowtide.zoo.pixels import DROPPED, chosen_typical, drawn, mnist

IMAGES = 12_000
# DiTPipeline asks for this class where guidance wants none.
NO_LABEL = 1000


def transformer() -> DiTTransformer2DModel:
    """5.8 M parameters on 16 patches of 32 x 2 x 2; a fifth of them are the labels that DiTPipeline counts on and nobody uses."""
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=32,
        out_channels=32,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NO_LABEL,
    )
    return without_label_dropout(model)


def without_label_dropout(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Each block would drop labels by a coin of its own; the loss drops them for the whole model at once."""
    for part in model.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = 0.0
    return model


def enlarged(digits: Tensor) -> Tensor:
    """Digits as the autoencoder wants them: 64 x 64, three channels, in [-1, 1]."""
    return F.interpolate(digits.float() / 127.5 - 1, size=64, mode="bilinear").expand(-1, 3, -1, -1)


def autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(zoo.folder("emoji-vae"), dtype=torch.float32).eval()


@torch.no_grad()
def digit_latents(vae: AutoencoderTiny, digits: Tensor) -> Tensor:
    """All of them, once. Batches of 8 and bf16 take a third of the time of large ones in float32."""
    vae = vae.to(device(), memory_format=torch.channels_last)
    with torch.autocast(device().type, torch.bfloat16):
        parts = [vae.encode(enlarged(part.to(device()))).latents.float() for part in digits.split(8)]
    return torch.cat(parts)


class LabelledDigitLatents:
    """Digits on demand, by a transformer that reads time and label in its layer norms."""

    data = f"the first {IMAGES:,} images of MNIST (CC BY-SA 3.0) and their labels, enlarged to 64 x 64, as latents of emoji-vae"
    shown = "A row for each digit from 0 to 9, guidance 2."

    def __init__(self, data: Path):
        images, labels = (part[:IMAGES] for part in mnist(data))
        self.vae, self.labels = autoencoder(), labels.to(device())
        self.typical = typical_first(images.to(device()), self.labels)
        latents = digit_latents(self.vae, images)
        self.scale = round(1 / latents.std().item(), 4)
        self.latents = latents * self.scale
        self.noising = DDPMScheduler(num_train_timesteps=1000)
        self.parts = nn.ModuleDict({"transformer": transformer()})

    def loss(self, parts: nn.ModuleDict, draw: torch.Generator, batch: int, leg: Leg) -> Tensor:
        places = chosen_typical(self.typical, draw, batch, leg)
        labels = self.labels[places].masked_fill(happens(DROPPED, draw, batch), NO_LABEL)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return parts["transformer"](noisy, timestep=timesteps, class_labels=labels).sample

        return noise_loss(predict, self.latents[places], draw, self.noising, leg)

    def pipeline(self, parts: nn.ModuleDict) -> DiTPipeline:
        self.vae.register_to_config(scaling_factor=self.scale)
        return DiTPipeline(parts["transformer"], self.vae, DDIMScheduler(num_train_timesteps=1000, clip_sample=False))

    def samples(self, pipe: DiTPipeline) -> np.ndarray:
        return drawn(pipe, 80, class_labels=[place // 8 for place in range(80)], guidance_scale=2.0)
