"""The environment of a measurement: the machine and the versions of the libraries."""

import platform
from pathlib import Path

import diffusers
import torch

from lowtide import __version__
from lowtide.report.evidence import Environment

_CPU_INFO = Path("/proc/cpuinfo")


def environment() -> Environment:
    return Environment(
        python=platform.python_version(),
        torch=str(torch.__version__),
        diffusers=diffusers.__version__,
        lowtide=__version__,
        cpu=_cpu_name(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def _cpu_name() -> str:
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
