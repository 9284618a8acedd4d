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
class CardFit:
    """One way to place a model on a card.

    peak_bytes: with whole batches. parts_bytes: with batches in parts of a few samples, to which a
        run cuts them where memory runs out. fits: whether these fit, if that is known.
    """

    bytes_of_a_weight: int
    place: str
    peak_bytes: int
    parts_bytes: int
    fits: bool | None


@dataclass(frozen=True)
class CardEstimate:
    """Memory on an accelerator.

    reckoned: by a data sheet, not probed. assumed: no card is here, and none was named.
    memory: bytes that the card has, if known.
    ways: every way to place the model there.
    dtype, place: what the run would choose; peak_bytes, parts_bytes and fits are of it.
    largest_unit: weights of the largest unit that is learnt at once.
    moving_seconds: of weights that come and go; they are part of no stage.
    """

    name: str
    reckoned: bool
    assumed: bool
    memory: int | None
    ways: tuple[CardFit, ...]
    dtype: str
    place: str
    peak_bytes: int
    parts_bytes: int
    fits: bool | None
    largest_unit: float
    moving_seconds: float


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that are held during the whole run.

    weights: of the pipeline.
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
    card: memory on an accelerator, if the plan is for one. Times are then of it, and peak_bytes
        stay those of the CPU's memory.
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
    card: CardEstimate | None = None

    def as_json(self) -> dict[str, Any]:
        """The estimate as values that JSON has; `fit` and `card` only where there is one."""
        data = asdict(self)
        data["stages"] = list(data["stages"])
        data["unpriced"] = list(data["unpriced"])
        for name in ("fit", "card"):
            if data[name] is None:
                del data[name]
        return data

    def totals(self) -> Totals:
        """The numbers that a finished run is compared with."""
        return {
            "on_disk": self.size["total"],
            "peak_bytes": self.peak_bytes,
            "minutes": round(self.seconds / 60, 2),
            "seconds": {stage.name: stage.seconds for stage in self.stages},
        }
