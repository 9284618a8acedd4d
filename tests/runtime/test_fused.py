"""Fused equals layer by layer: every pipeline and method, and what a program does not follow."""

import copy
import pickle
import warnings

import pytest
import tiny
import tiny_pipelines
import torch

import lowtide
from lowtide import runtime, sampling
from lowtide.methods import relevant_options
from lowtide.models import adapt
from lowtide.nn.clock import find_clock

QUICK = {"steps": 3, "images": 2, "calibration_steps": 2, "iters": 4, "batch": 2}


def quantized(pipe, method="minmax", **options):
    return lowtide.quantize(pipe, method=method, **relevant_options(method, QUICK | options))


def example(name: str, model, batch: int) -> dict:
    """Inputs of one call at the first calibrated timestep."""
    floating = tiny.model(name)
    torch.manual_seed(batch)
    adapter = adapt(floating)
    inputs = adapter.architecture.example(floating, batch)
    timestep = int(find_clock(model).timesteps[0]) / adapter.ticks
    kind = torch.float32 if adapter.ticks != 1 else torch.int64
    return inputs | {"timestep": torch.full((batch,), timestep, dtype=kind)}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", tiny.MODELS)
def test_x(name):
    pass
