"""Surroundings: the machine and the versions that numbers were measured with, and what was asked, as plain JSON."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from lowtide import __version__, sampling
from lowtide.evaluation.compared_models import Subject

CPU = Path("/proc/cpuinfo")


def environment() -> dict[str, Any]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return versions | {
        "lowtide": __version__,
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def cpu() -> str:
    lines = CPU.read_text().splitlines() if CPU.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def asked_request(subjects: Sequence[Subject], asked: dict[str, Any]) -> sampling.Request:
    """What to draw: as asked, else as the first packed model was calibrated, else 50 steps of seeds 0 to 63."""
    given = {name: value for name, value in asked.items() if value not in (None, ())}
    told = next((subject.record.settings for subject in subjects if subject.record), {})
    names = ("steps", "prompts", "labels", "guidance", "eta", "size")
    known = {name: told[name] for name in names if told.get(name) not in (None, [])}
    known = {
        name: tuple(value) if isinstance(value, list) else value for name, value in known.items()
    }
    return sampling.Request(**{"seeds": tuple(range(64))} | known | given)


def request_told(request: sampling.Request, scheduler: Any) -> dict[str, Any]:
    names = ("steps", "batch", "guidance", "eta")
    lists = {name: list(getattr(request, name)) for name in ("seeds", "prompts", "labels")}
    return (
        lists
        | {name: getattr(request, name) for name in names}
        | {"scheduler": type(scheduler).__name__}
    )


def captions(pipe: Any, request: sampling.Request) -> list[str] | None:
    """The prompt or the label of each seed."""
    arguments = sampling.call_arguments(pipe, request)
    found = arguments.get("prompt", arguments.get("class_labels"))
    return None if found is None else [str(each) for each in found]
