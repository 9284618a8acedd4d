"""zoo:dit, a small class-conditional diffusion transformer for digits.

It works in the latents of emoji-vae and runs in diffusers' DiTPipeline.
"""

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
from training.batches import device, random_flags, random_typical_indices, typical_first
from training.objective import noise_loss
from training.phases import TrainingPhase
from training.pixels import LABEL_DROPOUT, mnist
from training.task import sample_images

IMAGES = 12_000
# The class that DiTPipeline passes for the unconditional half of guidance.
NULL_LABEL = 1000


def transformer() -> DiTTransformer2DModel:
    """5.8 M parameters on 16 patches of 32 x 2 x 2.

    A fifth of the parameters are embeddings of the 1000 classes that DiTPipeline assumes; only ten
    of them are used.
    """
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=32,
        out_channels=32,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_LABEL,
    )
    return without_label_dropout(model)


def without_label_dropout(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Switch off the label dropout of each block.

    Each block would drop labels independently of the others. The loss drops them once for the
    whole model instead.
    """
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model


def enlarged(digits: Tensor) -> Tensor:
    """Digits as the autoencoder expects them: (n, 3, 64, 64) in [-1, 1]."""
    images = F.interpolate(digits.float() / 127.5 - 1, size=64, mode="bilinear")
    return images.expand(-1, 3, -1, -1)


def autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(zoo.folder("emoji-vae"), dtype=torch.float32).eval()


@torch.no_grad()
def digit_latents(vae: AutoencoderTiny, digits: Tensor) -> Tensor:
    """The latents of all digits: (n, 32, 8, 8).

    Batches of 8 in bf16 take a third of the time of large batches in float32.
    """
    vae = vae.to(device(), memory_format=torch.channels_last)
    with torch.autocast(device().type, torch.bfloat16):
        parts = [vae.encode(enlarged(part.to(device()))).latents for part in digits.split(8)]
    return torch.cat([part.float() for part in parts])


class ClassConditionalDigitLatents:
    """Class-conditional digits by a transformer whose layer norms read timestep and label."""

    data = (
        f"the first {IMAGES:,} images of MNIST (CC BY-SA 3.0) and their labels, "
        "enlarged to 64 x 64, as latents of emoji-vae"
    )  # fmt: skip
    shown = "A row for each digit from 0 to 9, guidance 2."

    def __init__(self, data: Path):
        images, labels = mnist(data)
        images = images[:IMAGES]
        self.vae = autoencoder()
        self.labels = labels[:IMAGES].to(device())
        self.ranked = typical_first(images.to(device()), self.labels)
        latents = digit_latents(self.vae, images)
        self.scale = round(1 / latents.std().item(), 4)
        self.latents = latents * self.scale
        self.noising = DDPMScheduler(num_train_timesteps=1000)
        self.parts = nn.ModuleDict({"transformer": transformer()})

    def loss(
        self,
        parts: nn.ModuleDict,
        generator: torch.Generator,
        batch: int,
        phase: TrainingPhase,
    ) -> Tensor:
        indices = random_typical_indices(self.ranked, generator, batch, phase)
        dropped = random_flags(LABEL_DROPOUT, generator, batch)
        labels = self.labels[indices].masked_fill(dropped, NULL_LABEL)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return parts["transformer"](noisy, timestep=timesteps, class_labels=labels).sample

        return noise_loss(predict, self.latents[indices], generator, self.noising, phase)

    def pipeline(self, parts: nn.ModuleDict) -> DiTPipeline:
        self.vae.register_to_config(scaling_factor=self.scale)
        scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
        return DiTPipeline(parts["transformer"], self.vae, scheduler)

    def samples(self, pipe: DiTPipeline) -> np.ndarray:
        labels = [index // 8 for index in range(80)]
        return sample_images(pipe, 80, class_labels=labels, guidance_scale=2.0)
