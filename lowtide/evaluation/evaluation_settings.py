"""The settings of an evaluation: what is sampled, what is measured, and the gates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.errors import BadInput
from lowtide.evaluation.gates import GATES
from lowtide.validation import Count, check, check_eta, listed

REQUEST_FIELDS = ("seeds", "steps", "batch", "prompts", "labels", "guidance", "eta", "size")


@dataclass(frozen=True)
class EvaluationSettings:
    """How models are compared, for `evaluate`, `compare` and the command line.

    metrics: names; None is the default set. dataset: a folder of images, or a file of Statistics.
    min_psnr, max_lpips, max_fd_increase: limits of the gates; None is no gate. The other fields
    are those of sampling.Request; None or empty means: as the model was quantized.
    """

    metrics: tuple[str, ...] | None = None
    dataset: Path | None = None
    min_psnr: float | None = None
    max_lpips: float | None = None
    max_fd_increase: float | None = None
    seeds: tuple[int, ...] | None = None
    steps: Count | None = None
    batch: Count | None = None
    prompts: tuple[str, ...] | None = None
    labels: tuple[int, ...] | None = None
    guidance: float | None = None
    eta: float | None = None
    size: Count | None = None

    def __post_init__(self) -> None:
        check(EvaluationSettings, vars(self))
        _check_finite(self.limits)
        if self.guidance is not None:
            _check_finite({"guidance": self.guidance})
        check_eta(self.eta)
        if self.seeds is not None:
            _check_seeds(self.seeds)

    @property
    def limits(self) -> dict[str, float]:
        """The limits of the gates that are set, by the gates' names."""
        limits = {name: getattr(self, _field(name)) for name in GATES}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @property
    def request_fields(self) -> dict[str, Any]:
        """The fields of sampling.Request that are set."""
        fields = {name: getattr(self, name) for name in REQUEST_FIELDS}
        return {name: value for name, value in fields.items() if value not in (None, ())}


def evaluation_settings(
    gates: Mapping[str, float] | None = None,
    dataset: str | Path | None = None,
    **fields: object,
) -> EvaluationSettings:
    """Settings from the arguments of `evaluate`: gates such as {"min-psnr": 25.0}, and fields."""
    limits = gates or {}
    if unknown := [name for name in limits if name not in GATES]:
        names = ", ".join(GATES)
        raise BadInput(f"found gate {unknown[0]!r}", f"one of {names}", "check the spelling")
    values = {name: listed(value) for name, value in fields.items()}
    values |= {_field(name): limit for name, limit in limits.items()}
    return EvaluationSettings(dataset=Path(dataset) if dataset else None, **values)


def _field(gate: str) -> str:
    """The field of a gate's limit."""
    return gate.replace("-", "_")


def _check_finite(numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise BadInput(f"found {name} {value}", "a finite number", f"give another --{name}")


def _check_seeds(seeds: tuple[int, ...]) -> None:
    """At least one, and each once: an image that counts twice makes intervals too narrow."""
    if not seeds:
        raise BadInput("found no seeds", "at least one", "give --seeds, such as --seeds 0-63")
    if len(set(seeds)) < len(seeds):
        repeated = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise BadInput(f"found seed {repeated} more than once", "each seed once", "remove it")
