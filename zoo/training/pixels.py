"""Zoo models that draw pixels: digits, unconditional or class-conditional, and CIFAR-10."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor, nn

from lowtide import zoo
from lowtide.errors import BadInput
from lowtide.sampling.pipelines import ClassConditionalPipeline
from training.batches import (
    device,
    random_flags,
    random_indices,
    random_typical_indices,
    typical_first,
)
from training.objective import noise_loss
from training.phases import TrainingPhase
from training.task import sample_images

MNIST = "MNIST (CC BY-SA 3.0), 60,000 images padded to 32 x 32"
NULL_LABEL = 10
LABEL_DROPOUT = 0.1


def digits_model(classes: int | None = None) -> UNet2DModel:
    """A UNet of 1.1 M parameters: three levels, attention at 8 x 8 and in the middle block."""
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


def class_conditional_digits_model() -> UNet2DModel:
    """zoo:digits with an added class embedding of zeros, so that it starts as zoo:digits."""
    model = digits_model(NULL_LABEL + 1)
    start = UNet2DModel.from_pretrained(zoo.folder("digits") / "unet", dtype=torch.float32)
    embedding = {"class_embedding.weight": torch.zeros_like(model.class_embedding.weight)}
    model.load_state_dict(start.state_dict() | embedding)
    return model


def cifar10_model() -> UNet2DModel:
    """26 M parameters: the DDPM paper's widths on three levels.

    Attention is at 16 x 16 and in the middle block.
    """
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
    )


def small_cifar10_model() -> UNet2DModel:
    """About 2 M parameters, to be trained on a CPU.

    One layer per level; attention is at 8 x 8 and in the middle block.
    """
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
    """MNIST padded to 32 x 32, (60000, 1, 32, 32) uint8, and its labels, (60000,)."""
    arrays = np.load(data / "mnist" / "mnist.npz")
    images = torch.from_numpy(arrays["train_x"]).reshape(-1, 1, 28, 28)
    labels = torch.from_numpy(arrays["train_y"]).long()
    return F.pad(images, (2, 2, 2, 2)), labels


def cifar10(data: Path) -> Tensor:
    """The training images in the data folder: (n, 3, 32, 32) uint8.

    Each file is a strip of 32 x 32 images, stacked vertically.
    """
    strips = sorted((data / "cifar10").glob("train_*.webp"))
    if not strips:
        raise BadInput(
            "found no cifar10/train_*.webp in the data folder",
            "CIFAR-10 in strips",
            "name the folder with --data",
        )
    images = torch.cat([_images_of_strip(strip) for strip in strips])
    return images.permute(0, 3, 1, 2).contiguous()


def _images_of_strip(path: Path) -> Tensor:
    """The images of one strip: (n, 32, 32, 3)."""
    strip = np.array(Image.open(path).convert("RGB"))
    return torch.from_numpy(strip).reshape(-1, 32, 32, 3)


class Digits:
    """Unconditional digits."""

    data = MNIST
    shown = ""

    def __init__(self, data: Path):
        images, labels = mnist(data)
        self.images = images.to(device())
        self.noising = DDPMScheduler(num_train_timesteps=1000)
        self.ranked = typical_first(self.images, labels.to(device()))
        self.parts = nn.ModuleDict({"unet": digits_model()})

    def loss(
        self,
        parts: nn.ModuleDict,
        generator: torch.Generator,
        batch: int,
        phase: TrainingPhase,
    ) -> Tensor:
        indices = random_typical_indices(self.ranked, generator, batch, phase)
        clean = self.images[indices].float() / 127.5 - 1

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return parts["unet"](noisy, timesteps).sample

        return noise_loss(predict, clean, generator, self.noising, phase)

    def pipeline(self, parts: nn.ModuleDict) -> DDIMPipeline:
        return DDIMPipeline(parts["unet"], DDIMScheduler(num_train_timesteps=1000))

    def samples(self, pipe: DDIMPipeline) -> np.ndarray:
        return sample_images(pipe, 64, batch_size=64)


class ClassConditionalDigits:
    """Class-conditional digits for classifier-free guidance: training drops one label in ten."""

    data = f"{MNIST}, and their labels; starts from the weights of zoo:digits"
    shown = "A row for each digit from 0 to 9, guidance 2."

    def __init__(self, data: Path):
        images, labels = mnist(data)
        self.images = images.to(device())
        self.labels = labels.to(device())
        self.ranked = typical_first(self.images, self.labels)
        self.noising = DDPMScheduler(num_train_timesteps=1000)
        self.parts = nn.ModuleDict({"unet": class_conditional_digits_model()})

    def loss(
        self,
        parts: nn.ModuleDict,
        generator: torch.Generator,
        batch: int,
        phase: TrainingPhase,
    ) -> Tensor:
        indices = random_typical_indices(self.ranked, generator, batch, phase)
        clean = self.images[indices].float() / 127.5 - 1
        dropped = random_flags(LABEL_DROPOUT, generator, batch)
        labels = self.labels[indices].masked_fill(dropped, NULL_LABEL)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return parts["unet"](noisy, timesteps, class_labels=labels).sample

        return noise_loss(predict, clean, generator, self.noising, phase)

    def pipeline(self, parts: nn.ModuleDict) -> ClassConditionalPipeline:
        """The scheduler does not clip.

        Guidance acts on the noise. If the scheduler clips the estimated image but keeps the guided
        noise, the samples drift away from their label.
        """
        scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
        return ClassConditionalPipeline(parts["unet"], scheduler, null_label=NULL_LABEL)

    def samples(self, pipe: ClassConditionalPipeline) -> np.ndarray:
        labels = [index // 8 for index in range(80)]
        return sample_images(pipe, 80, class_labels=labels, guidance_scale=2.0)


class Cifar10:
    """Unconditional CIFAR-10; training mirrors half of the images."""

    shown = ""

    def __init__(self, data: Path, model: Callable[[], UNet2DModel]):
        self.images = cifar10(data).to(device())
        self.noising = DDPMScheduler(num_train_timesteps=1000)
        self.data = f"CIFAR-10, {len(self.images):,} training images, half of them mirrored"
        self.parts = nn.ModuleDict({"unet": model()})

    def loss(
        self,
        parts: nn.ModuleDict,
        generator: torch.Generator,
        batch: int,
        phase: TrainingPhase,
    ) -> Tensor:
        indices = random_indices(self.images, generator, batch)
        clean = self.images[indices].float() / 127.5 - 1
        mirrored = random_flags(0.5, generator, batch).reshape(-1, 1, 1, 1)
        clean = torch.where(mirrored, clean.flip(-1), clean)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return parts["unet"](noisy, timesteps).sample

        return noise_loss(predict, clean, generator, self.noising, phase)

    def pipeline(self, parts: nn.ModuleDict) -> DDIMPipeline:
        return DDIMPipeline(parts["unet"], DDIMScheduler(num_train_timesteps=1000))

    def samples(self, pipe: DDIMPipeline) -> np.ndarray:
        return sample_images(pipe, 64, batch_size=64)
