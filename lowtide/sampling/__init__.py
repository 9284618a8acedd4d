"""Sampling: requests, the driver of each pipeline, the trajectory that calibration and evaluation read, and loading."""

from lowtide.sampling.drivers import (
    DRIVERS,
    call_arguments,
    check_steps,
    denoiser,
    denoiser_name,
    heeded,
)
from lowtide.sampling.loading import as_pipeline, class_name, load_pipeline, local_folder
from lowtide.sampling.pipelines import ModulePipeline, takes_generator
from lowtide.sampling.recording import (
    example,
    images,
    kept_value,
    listening,
    moment,
    run_pipeline,
    timesteps,
    trajectory,
)
from lowtide.sampling.request import Moment, Request, read_prompts

__all__ = [
    "DRIVERS",
    "ModulePipeline",
    "Moment",
    "Request",
    "as_pipeline",
    "call_arguments",
    "check_steps",
    "class_name",
    "denoiser",
    "denoiser_name",
    "example",
    "heeded",
    "images",
    "kept_value",
    "listening",
    "load_pipeline",
    "local_folder",
    "moment",
    "read_prompts",
    "run_pipeline",
    "takes_generator",
    "timesteps",
    "trajectory",
]
