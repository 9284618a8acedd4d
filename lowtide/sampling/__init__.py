"""Sampling: requests, pipelines and their drivers, loading, and the recorded trajectory."""

from lowtide.sampling.apart import other_parts, parts_apart
from lowtide.sampling.call_files import read_call
from lowtide.sampling.drivers import (
    DENOISERS,
    DRIVERS,
    call_arguments,
    check_steps,
    denoiser,
    denoiser_name,
    supported_fields,
)
from lowtide.sampling.example_calls import check_no_image_adapter, example_inputs, pipeline_adapter
from lowtide.sampling.loading import (
    as_pipeline,
    class_name,
    load_pipeline,
    local_folder,
    pipeline_class,
    quiet_libraries,
)
from lowtide.sampling.pipelines import ModulePipeline, Pipeline, Scheduler
from lowtide.sampling.recording import (
    images,
    record_calls,
    run_pipeline,
    timesteps,
    trajectory,
)
from lowtide.sampling.request import Moment, read_prompts
from lowtide.sampling.schedulers import scheduled, scheduler_like
from lowtide.settings import Request

__all__ = [
    "DENOISERS",
    "DRIVERS",
    "ModulePipeline",
    "Moment",
    "Pipeline",
    "Request",
    "Scheduler",
    "as_pipeline",
    "call_arguments",
    "check_no_image_adapter",
    "check_steps",
    "class_name",
    "denoiser",
    "denoiser_name",
    "example_inputs",
    "images",
    "load_pipeline",
    "local_folder",
    "other_parts",
    "parts_apart",
    "pipeline_adapter",
    "pipeline_class",
    "quiet_libraries",
    "read_call",
    "read_prompts",
    "record_calls",
    "run_pipeline",
    "scheduled",
    "scheduler_like",
    "supported_fields",
    "timesteps",
    "trajectory",
]
