"""Zoo models that draw in pixels: digits, with labels or without, and CIFAR-10."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor, nn

from lowtide import zoo
from lowtide.errors import BadInput
from lowtide.sampling.pipelines import ClassConditionalPipeline
from lowtide.zoo.noise import Leg, chosen, device, happens, noise_loss, typical_first

MNIST = "MNIST (CC BY-SA 3.0), 60,000 images padded to 32 x 32"
NO_LABEL = 10
DROPPED = 0.1
STEPS = 50


def digits_model(classes: int | None = None) -> UNet2DModel:
    """A 1.1 M parameter UNet: three levels, attention at 8 x 8 and in the middle."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
        num_class_embeds=classes,
    )


def labelled_digits_model() -> UNet2DModel:
    """zoo:digits with a table of labels that says nothing yet."""
    model, start = digits_model(NO_LABEL + 1), UNet2DModel.from_pretrained(zoo.folder("digits") / "unet", dtype=torch.float32)
    table = {"class_embedding.weight": torch.zeros_like(model.class_embedding.weight)}
    model.load_state_dict(start.state_dict() | table)
    return model


def cifar_model() -> UNet2DModel:
    """26 M parameters: the widths of the DDPM paper's UNet on three levels, attention at 16 x 16 and in the middle."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
    )


def small_cifar_model() -> UNet2DModel:
    """About 2 M parameters, for a CPU: one layer a level, attention at 8 x 8 and in the middle."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(48, 80, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=32,
    )


def mnist(data: Path) -> tuple[Tensor, Tensor]:
    """MNIST padded to 32 x 32, uint8, and its labels."""
    found = np.load(data / "mnist" / "mnist.npz")
    images = torch.from_numpy(found["train_x"]).reshape(-1, 1, 28, 28)
    return F.pad(images, (2, 2, 2, 2)), torch.from_numpy(found["train_y"]).long()


def cifar(data: Path) -> Tensor:
    """The training images that are there, uint8: strips of 32 x 32 images, one under the other or side by side."""
    strips = sorted((data / "cifar10").glob("train_*.webp"))
    if not strips:
        raise BadInput("found no cifar10/train_*.webp in the data folder", "CIFAR-10 in strips", "name the folder with --data")
    images = [torch.from_numpy(np.array(Image.open(strip).convert("RGB"))).reshape(-1, 32, 32, 3) for strip in strips]
    return torch.cat(images).permute(0, 3, 1, 2).contiguous()


def drawn(pipe: Any, count: int, **options: Any) -> np.ndarray:
    """Images for a grid, one generator each."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(generator=generators, num_inference_steps=STEPS, output_type="np", **options).images


def chosen_typical(ranked: Tensor, draw: torch.Generator, batch: int, leg: Leg) -> Tensor:
    """The places of one batch among the share of images that the leg learns from; in the data's own order where it is all."""
    learnt = ranked[: int(leg.typical * len(ranked))] if leg.typical < 1 else torch.arange(len(ranked), device=draw.device)
    return learnt[chosen(learnt, draw, batch)]


class Digits:
    """Unconditional digits."""

    data = MNIST
    shown = ""

    def __init__(self, data: Path):
        images, labels = mnist(data)
        self.images, self.noising = images.to(device()), DDPMScheduler(num_train_timesteps=1000)
        self.typical = typical_first(self.images, labels.to(device()))
        self.parts = nn.ModuleDict({"unet": digits_model()})

    def loss(self, parts: nn.ModuleDict, draw: torch.Generator, batch: int, leg: Leg) -> Tensor:
        clean = self.images[chosen_typical(self.typical, draw, batch, leg)].float() / 127.5 - 1
        return noise_loss(lambda noisy, t: parts["unet"](noisy, t).sample, clean, draw, self.noising, leg)

    def pipeline(self, parts: nn.ModuleDict) -> DDIMPipeline:
        return DDIMPipeline(parts["unet"], DDIMScheduler(num_train_timesteps=1000))

    def samples(self, pipe: DDIMPipeline) -> np.ndarray:
        return drawn(pipe, 64, batch_size=64)


class LabelledDigits:
    """Digits on demand, with guidance: one label in ten is left out in training."""

    data = f"{MNIST}, and their labels; starts from the weights of zoo:digits"
    shown = "A row for each digit from 0 to 9, guidance 2."

    def __init__(self, data: Path):
        images, labels = mnist(data)
        self.images, self.labels = images.to(device()), labels.to(device())
        self.typical = typical_first(self.images, self.labels)
        self.noising = DDPMScheduler(num_train_timesteps=1000)
        self.parts = nn.ModuleDict({"unet": labelled_digits_model()})

    def loss(self, parts: nn.ModuleDict, draw: torch.Generator, batch: int, leg: Leg) -> Tensor:
        places = chosen_typical(self.typical, draw, batch, leg)
        clean, labels = self.images[places].float() / 127.5 - 1, self.labels[places]
        labels = labels.masked_fill(happens(DROPPED, draw, batch), NO_LABEL)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return parts["unet"](noisy, timesteps, class_labels=labels).sample

        return noise_loss(predict, clean, draw, self.noising, leg)

    def pipeline(self, parts: nn.ModuleDict) -> ClassConditionalPipeline:
        """Unclipped: clipping a guided estimate while the noise keeps its guidance drives pictures away from their label."""
        scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
        return ClassConditionalPipeline(parts["unet"], scheduler, null_label=NO_LABEL)

    def samples(self, pipe: ClassConditionalPipeline) -> np.ndarray:
        return drawn(pipe, 80, class_labels=[place // 8 for place in range(80)], guidance_scale=2.0)


class Cifar:
    """Unconditional CIFAR-10, half of the images mirrored."""

    shown = ""

    def __init__(self, data: Path, model: Callable[[], UNet2DModel]):
        self.images, self.noising = cifar(data).to(device()), DDPMScheduler(num_train_timesteps=1000)
        self.data = f"CIFAR-10, {len(self.images):,} training images, half of them mirrored"
        self.parts = nn.ModuleDict({"unet": model()})

    def loss(self, parts: nn.ModuleDict, draw: torch.Generator, batch: int, leg: Leg) -> Tensor:
        clean = self.images[chosen(self.images, draw, batch)].float() / 127.5 - 1
        mirrored = happens(0.5, draw, batch).reshape(-1, 1, 1, 1)
        clean = torch.where(mirrored, clean.flip(-1), clean)
        return noise_loss(lambda noisy, t: parts["unet"](noisy, t).sample, clean, draw, self.noising, leg)

    def pipeline(self, parts: nn.ModuleDict) -> DDIMPipeline:
        return DDIMPipeline(parts["unet"], DDIMScheduler(num_train_timesteps=1000))

    def samples(self, pipe: DDIMPipeline) -> np.ndarray:
        return drawn(pipe, 64, batch_size=64)
