"""Limits of memory and disk, and room for the result, checked before the work begins."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from lowtide.errors import BadInput
from lowtide.estimate import Estimate
from lowtide.report.wording import size

CODE = 4  # bytes of a float32 weight for each byte of a kept code


@dataclass(frozen=True)
class Limits:
    """The most bytes that a run may take, as predicted; None: what there is."""

    memory: int | None = None
    disk: int | None = None


def check_limits(predicted: Estimate, out: Path, limits: Limits) -> None:
    """Raise where the run is predicted to take more than the limits, or the disk has no room."""
    if limits.memory is not None and predicted.peak_bytes > limits.memory:
        raise BadInput(
            f"found a run that is predicted to take {size(predicted.peak_bytes)} of memory",
            f"at most {size(limits.memory)} (--max-memory)",
            "hold less calibration data (--memory), take fewer --images or a smaller --batch, or "
            "raise the limit",
        )
    result = result_bytes(predicted)
    kept = kept_bytes(predicted)
    if limits.disk is not None and result + kept > limits.disk:
        raise BadInput(
            f"found a run that is predicted to take {size(result + kept)} of disk: {size(result)} "
            f"for the result and {size(kept)} for finished parts",
            f"at most {size(limits.disk)} (--max-disk)",
            "take fewer --images or --weights of fewer bits, or raise the limit",
        )
    home = next(parent for parent in out.absolute().parents if parent.exists())
    left = shutil.disk_usage(home).free
    if result > left:
        raise BadInput(
            f"found {size(left)} left in {home} for a result of {size(result)}",
            "room for it beside what stands there",
            "free some space, or choose another --out",
        )


def result_bytes(predicted: Estimate) -> int:
    """The packed weights, and the other components in float."""
    return predicted.size["total"] + sum(predicted.others.values())


def kept_bytes(predicted: Estimate) -> int:
    """The finished parts of an unfinished run: the calibration set, and a byte for each code."""
    return predicted.memory.calls + predicted.float_bytes // CODE
