"""The typed face of lowtide. Written by tools/face_stub.py; not by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from lowtide.checkpoint.quantized_pipeline import Quantized as Quantized
from lowtide.errors import BadInput as BadInput
from lowtide.estimate import Estimate as Estimate
from lowtide.evaluation.comparison import Evaluation as Evaluation
from lowtide.methods import METHODS as METHODS
from lowtide.models import adapt as adapt
from lowtide.sampling import images as images
from lowtide.settings import EvaluationSettings as EvaluationSettings
from lowtide.settings import Request as Request
from lowtide.settings import Settings as Settings

__version__: str

Model = DiffusionPipeline | nn.Module | str | Path
MethodName = Literal["best", "minmax", "ptq4dm", "qdiffusion", "ptqd", "tfmq", "temporal_cache", "tcaq", "efficientdm", "mpq"]

def quantize(
    target: Model,
    *,
    method: MethodName = "best",
    folder: str | Path | None = None,
    without: Sequence[str] = (),
    weights: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] = 4,
    inputs: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] = 8,
    group: int | None = None,
    profile: Literal["full", "paper"] = "full",
    steps: int = 50,
    images: int = 32,
    calibration_steps: int = 25,
    prompts: Sequence[str] = (),
    labels: Sequence[int] = (),
    guidance: float | None = None,
    eta: float | None = None,
    size: int | None = None,
    seed: int = 0,
    memory: int = 134217728,
    iters: int = 1000,
    batch: int = 16,
    scope: Literal["block", "layer"] = "block",
    drop: float | None = None,
    range_iters: int = 0,
    early_stop: bool = False,
    keep_temporal: bool = False,
    stages: Mapping[str, Mapping[str, Any]] = ...,
) -> Quantized: ...

def plan(
    source: str | Path,
    *,
    method: MethodName = "best",
    without: Sequence[str] = (),
    fit: str | None = None,
    weights: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] = 4,
    inputs: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] = 8,
    group: int | None = None,
    profile: Literal["full", "paper"] = "full",
    steps: int = 50,
    images: int = 32,
    calibration_steps: int = 25,
    prompts: Sequence[str] = (),
    labels: Sequence[int] = (),
    guidance: float | None = None,
    eta: float | None = None,
    size: int | None = None,
    seed: int = 0,
    memory: int = 134217728,
    iters: int = 1000,
    batch: int = 16,
    scope: Literal["block", "layer"] = "block",
    drop: float | None = None,
    range_iters: int = 0,
    early_stop: bool = False,
    keep_temporal: bool = False,
    stages: Mapping[str, Mapping[str, Any]] = ...,
) -> Estimate: ...

def evaluate(
    model: Model | Quantized,
    *,
    reference: Model | None = None,
    out: str | Path | None = None,
    gates: Mapping[str, float] | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    batch: int | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    size: int | None = None,
    metrics: Sequence[str] | None = None,
    dataset: str | None = None,
    min_psnr: float | None = None,
    max_lpips: float | None = None,
    max_fd_increase: float | None = None,
) -> Evaluation: ...

def compare(
    *models: Model | Quantized,
    reference: Model | None = None,
    out: str | Path = "evidence",
    gates: Mapping[str, float] | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    batch: int | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    size: int | None = None,
    metrics: Sequence[str] | None = None,
    dataset: str | None = None,
    min_psnr: float | None = None,
    max_lpips: float | None = None,
    max_fd_increase: float | None = None,
) -> Evaluation: ...

def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline: ...

def save(
    model: Quantized | DiffusionPipeline,
    folder: str | Path,
) -> Path: ...

def reschedule(
    target: DiffusionPipeline | Quantized | str | Path,
    steps: int,
    *,
    size: int | None = None,
) -> Quantized: ...
