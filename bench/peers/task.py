"""Task, what a recipe gets (model, bits, calibration calls), and Packed, what it returns."""

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowtide import sampling
from lowtide.models import Adapter, adapt
from peers.cells import BATCH

FLOAT = 32
# lowtide keeps the weights of the first and the last layer at 8 bits, and their inputs in float. A
# peer that can choose keeps 8 bits.
END_BITS = 8
CALIBRATION_SEEDS = 1_000_000_007


class Unable(Exception):
    """The peer cannot do this; the message says why in a few words."""


@dataclass(frozen=True)
class Bits:
    """Bits of weights and of inputs; 16 leaves the inputs in float."""

    weights: int
    inputs: int

    @classmethod
    def read(cls, text: str) -> "Bits":
        match = re.fullmatch(r"w(\d+)a(\d+)", text.lower())
        if match is None:
            raise SystemExit(f"found bits {text!r}; expected such as w4a8; write --bits w8a8,w4a8.")
        return cls(*map(int, match.groups()))

    @property
    def quantized_inputs(self) -> bool:
        return self.inputs < 16


@dataclass(frozen=True)
class Held:
    """The bits one layer's weights are stored in, and those its inputs are rounded to."""

    weights: int
    inputs: int = FLOAT


@dataclass
class Packed:
    """A quantized denoiser, what its layers hold, and how its own package writes it to a folder."""

    model: nn.Module
    held: dict[str, Held]
    save: Callable[[Path], Any]
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """One way to quantize, and the bits it is meant for."""

    run: Callable[["Task"], Packed]
    serves: Callable[[Bits], bool] = lambda bits: True


@dataclass
class Task:
    """One model to be quantized to some bits."""

    source: str
    bits: Bits
    steps: int
    images: int
    iters: int
    conditions: dict[str, Any]

    @cached_property
    def pipe(self) -> Any:
        return sampling.load_pipeline(self.source)

    @property
    def model(self) -> nn.Module:
        return sampling.denoiser(self.pipe).eval().requires_grad_(False)

    @cached_property
    def adapter(self) -> Adapter:
        return adapt(self.model)

    @cached_property
    def weights(self) -> dict[str, int]:
        """Every layer with a matrix product, and how many weights it has."""
        return {name: layer.weight.numel() for name, layer in self.adapter.layers().items()}

    @property
    def ends(self) -> list[str]:
        return [name for name in self.adapter.ends() if name in self.weights]

    @property
    def inner(self) -> list[str]:
        return [name for name in self.weights if name not in self.ends]

    def request(self, seeds: Iterable[int]) -> sampling.Request:
        return sampling.Request(
            steps=self.steps, seeds=tuple(seeds), batch=BATCH, **self.conditions
        )

    @cached_property
    def calls(self) -> list[dict[str, Tensor]]:
        """The denoiser's inputs over float trajectories, the same that lowtide calibrates on."""
        request = self.request(range(CALIBRATION_SEEDS, CALIBRATION_SEEDS + self.images))
        return [tensors(moment.arguments) for moment in sampling.trajectory(self.pipe, request)]

    def replace(self, model: nn.Module) -> None:
        setattr(self.pipe, sampling.denoiser_name(self.pipe), model)


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


class Bare(nn.Module):
    """The denoiser as exporters need it: positional tensors in, one tensor out."""

    def __init__(self, model: nn.Module, names: Iterable[str]):
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *values: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, values, strict=True)), return_dict=False)[0]


class Served(nn.Module):
    """An exported denoiser in the place of the original, with the original's signature."""

    def __init__(self, model: nn.Module, names: Iterable[str], answer: Callable[..., Tensor]):
        super().__init__()
        self.config = model.config
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.names = tuple(names)
        self.answer = answer
        self.signature = inspect.signature(model.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(self.signature.bind(*args, **kwargs).arguments)
        timestep = torch.as_tensor(arguments["timestep"]).reshape(-1)
        arguments["timestep"] = timestep.expand(len(arguments[self.names[0]]))
        eps = self.answer(*(arguments[name].contiguous() for name in self.names))
        return Answer(eps) if arguments.get("return_dict", True) else (eps,)


@dataclass(frozen=True)
class Answer:
    """What diffusers' pipelines read of a denoiser's output."""

    sample: Tensor

    def __getitem__(self, place: int) -> Tensor:
        return (self.sample,)[place]
