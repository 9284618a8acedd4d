"""Denoisers of one's own, of samples with any number of axes, with and without a condition."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16


class Block(nn.Module):
    """A norm in float32, and two layers around the time."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH) * 1.1)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.shift = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        shift = self.shift(time)
        shift = shift.reshape(len(shift), *[1] * (hidden.dim() - 2), -1)
        normed = F.layer_norm(hidden.float(), (WIDTH,), self.gain.float())
        return hidden + self.second(torch.relu(self.first(normed) + shift))


class Tokens(nn.Module):
    """Called (x, timestep, label); the last axis of x holds the channels."""

    def __init__(self, channels: int = 4, labels: bool = False):
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.enter = nn.Linear(channels, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.leave = nn.Linear(WIDTH, channels)
        self.label = nn.Linear(3, WIDTH) if labels else None

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        time = torch.as_tensor(timestep).reshape(-1).expand(len(x)).float()
        angles = torch.exp(-torch.arange(WIDTH // 2, device=x.device)) * time[:, None]
        features = torch.relu(self.embed(torch.cat([angles.sin(), angles.cos()], 1)))
        if self.label is not None:
            features = features + self.label(label)
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden, features)
        return self.leave(hidden)


class Labelled(Tokens):
    """The same with a label."""

    def __init__(self):
        super().__init__(labels=True)
