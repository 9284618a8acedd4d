"""What a training task is: the modules, their loss, and the pipeline that they form."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from training.phases import TrainingPhase

STEPS = 50


class Task(Protocol):
    """What is trained.

    data: what the model learns from, as its card says it.
    shown: what the grid of samples shows, row by row of eight images.
    parts: the modules with weights, by the name that the pipeline has for them.
    """

    data: str
    shown: str
    parts: nn.ModuleDict

    def loss(
        self,
        parts: nn.ModuleDict,
        generator: torch.Generator,
        batch: int,
        phase: TrainingPhase,
    ) -> Tensor: ...

    def pipeline(self, parts: nn.ModuleDict) -> Any: ...

    def samples(self, pipe: Any) -> np.ndarray: ...


def sample_images(pipe: Any, count: int, **options: Any) -> np.ndarray:
    """Images for the grid, one generator each: (count, height, width, channels), 0 to 1."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    result = pipe(generator=generators, num_inference_steps=STEPS, output_type="np", **options)
    return result.images
