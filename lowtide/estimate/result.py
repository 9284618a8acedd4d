"""Estimate: what quantizing a model is predicted to take, as data."""

from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from lowtide.settings import StageOptions


@dataclass(frozen=True)
class StageEstimate:
    """Seconds of one stage, and the peak memory while it runs."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that are held during the whole run.

    weights: of the pipeline in float32.
    calls: of the recorded calls, which are the calibration set.
    tape: the most bytes of unit inputs and answers in memory; the rest goes to disk.
    """

    weights: int
    calls: int
    tape: int


@dataclass(frozen=True)
class FitChoice:
    """The bits of weights that fit a limit on the size of the checkpoint.

    limit: the limit in bytes.
    weights: the bits that were chosen.
    tried: the size of the checkpoint by bits, from more bits to fewer.
    """

    limit: int
    weights: int
    tried: dict[int, int]


class Totals(TypedDict):
    """The numbers that a finished run is compared with, by the names of its report."""

    on_disk: int
    peak_bytes: int
    minutes: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """What quantizing a model is predicted to take.

    options: options of stages, by stage and name.
    fit: how the bits of weights were chosen, if a limit on the size was set.
    size: bytes of the checkpoint's weight file by kind, with the sum as "total".
    float_bytes: bytes of the denoiser in float32.
    seconds, peak_bytes: of the whole run.
    others: bytes of each other component of the pipeline, which stays in float.
    unpriced: stages whose cost is not known; they count as nothing.
    speed: billions of units a second that this machine does, by kind of work.
    predicted_in: seconds that the estimate took.
    """

    model: str
    method: str
    weights: int
    inputs: int
    options: StageOptions
    fit: FitChoice | None
    size: dict[str, int]
    float_bytes: int
    stages: tuple[StageEstimate, ...]
    seconds: float
    peak_bytes: int
    memory: MemoryEstimate
    others: dict[str, int]
    unpriced: tuple[str, ...]
    speed: dict[str, float]
    predicted_in: float

    def as_json(self) -> dict[str, Any]:
        """The estimate as values that JSON has; without the key `fit` if no limit was set."""
        data = asdict(self)
        data["stages"] = list(data["stages"])
        data["unpriced"] = list(data["unpriced"])
        if self.fit is None:
            del data["fit"]
        return data

    def totals(self) -> Totals:
        """The numbers that a finished run is compared with."""
        return {
            "on_disk": self.size["total"],
            "peak_bytes": self.peak_bytes,
            "minutes": round(self.seconds / 60, 2),
            "seconds": {stage.name: stage.seconds for stage in self.stages},
        }
