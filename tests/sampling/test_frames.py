"""A pipeline of one's own that draws videos: the frames of a sample are rows inside."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import lowtide
from lowtide import sampling
from lowtide.nn.request_features import PerRequest

FRAMES = 3
WIDTH = 8


class Block(nn.Module):
    """Adds a projection of the time to the frames."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.shift = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        return hidden + self.mix(input=torch.relu(hidden + self.shift(time)[:, None]))


class Film(nn.Module):
    """Reads (batch, frames, tokens, channels), and a text for each frame."""

    def __init__(self, labelled: bool):
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.label = nn.Linear(2, WIDTH) if labelled else None
        self.text = nn.Linear(4, WIDTH)
        self.enter = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.leave = nn.Linear(WIDTH, 2)

    def forward(self, sample: Tensor, timestep: Tensor, texts: Tensor, label: Tensor) -> Tensor:
        angle = timestep.reshape(-1, 1).expand(len(sample), 1) / 100
        time = torch.relu(self.embed(torch.cat([angle.sin(), angle.cos()], 1)))
        time = time if self.label is None else time + self.label(label)
        time = time.repeat_interleave(FRAMES, 0)
        hidden = self.enter(sample.flatten(0, 1)) + self.text(texts)
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.leave(hidden).unflatten(0, (len(sample), FRAMES))


@dataclass(eq=False)
class FilmPipeline:
    """Called as those of diffusers are."""

    unet: Film
    scheduler: DDIMScheduler

    @torch.no_grad()
    def __call__(self, batch_size, generator, num_inference_steps, output_type):
        x = torch.stack([torch.randn(FRAMES, 5, 2, generator=each) for each in generator])
        texts = torch.stack([torch.randn(FRAMES, 5, 4, generator=each) for each in generator])
        label = torch.stack([torch.randn(2, generator=each) for each in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            eps = self.unet(x, t, texts=texts.flatten(0, 1), label=label)
            x = self.scheduler.step(eps, t, x).prev_sample
        return sampling.pipelines.Images(x.numpy())


@pytest.mark.parametrize("labelled", [False, True])
def test_rounding_is_learnt_on_the_frames_of_mixed_timesteps(labelled):
    torch.manual_seed(0)
    pipe = FilmPipeline(Film(labelled).eval(), DDIMScheduler())
    request = sampling.Request(steps=4, seeds=(1, 2))
    expected = torch.from_numpy(sampling.images(pipe, request))
    options = {"steps": 4, "images": 4, "iters": 4, "calibration_steps": 3, "weights": 8}
    quantized = lowtide.quantize(pipe, method="best", **options)
    kinds = [isinstance(each, PerRequest) for each in pipe.unet.modules()]
    assert sum(kinds) == (2 if labelled else 0)
    assert len(quantized.plan.cached) == (0 if labelled else 2)
    images = torch.from_numpy(sampling.images(pipe, request))
    assert 0 < (images - expected).norm() < 0.05 * expected.norm()
    parts = torch.from_numpy(sampling.images(pipe, sampling.Request(steps=4, seeds=(2,))))
    assert (parts - images[1:]).norm() < 1e-4 * images[1:].norm()
