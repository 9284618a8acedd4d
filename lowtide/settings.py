"""Settings: what to quantize to, and how much to spend on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from lowtide.errors import BadInput
from lowtide.formats import check_bits
from lowtide.validation import Count, Share, Within, check, check_eta, listed

PROFILES = ("full", "paper")
SCOPES = ("block", "layer")
LARGEST_BATCH = 16


@dataclass(frozen=True)
class Settings:
    """What to quantize to, and how much to spend on it.

    `scope`: roundings are learnt block by block (BRECQ) or layer by layer (AdaRound). `drop`: None learns them on inputs in
    float (BRECQ), 0.5 on inputs of which each value is rounded or, with this chance, as it was (QDrop). `stages`: options of the
    method's stages by name, such as {"omq": {"plus": True}}; for which there are, see the stage's fields.
    """

    weights: int = 4
    inputs: int = 8
    steps: Count = 50
    profile: str = "full"
    group: Count | None = None
    images: Count = 32
    calibration_steps: Count = 25
    iters: Count = 1000
    batch: Count = 16
    scope: str = "block"
    drop: Share | None = None
    range_iters: Annotated[int, Within(0)] = 0
    early_stop: bool = False
    keep_temporal: bool = False
    memory: Annotated[int, Within(0)] = 128 << 20
    guidance: float | None = None
    eta: float | None = None
    size: Count | None = None
    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    seed: int = 0
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(Settings, vars(self))
        check_bits(self.weights, "weights")
        check_bits(self.inputs, "inputs")
        if self.profile not in PROFILES:
            raise BadInput(f"found profile {self.profile!r}", " or ".join(PROFILES), "choose one")
        if self.scope not in SCOPES:
            raise BadInput(f"found scope {self.scope!r}", " or ".join(SCOPES), "choose one")
        if self.drop is not None and self.scope == "layer":
            raise BadInput(
                "found drop with scope layer",
                "blocks, which QDrop is about",
                "leave one of them away",
            )
        check_eta(self.eta)

    @property
    def calibration_batch(self) -> int:
        """Images of one calibration batch: as many as divide all images evenly, at most 16.

        Batches have one size, because graphs are recorded for one.
        """
        return max(size for size in range(1, LARGEST_BATCH + 1) if self.images % size == 0)


def settings_from(options: dict[str, object]) -> Settings:
    """Settings from keywords, with an error that names what exists."""
    names = [known.name for known in fields(Settings)]
    if unknown := sorted(set(options) - set(names)):
        raise BadInput(
            f"found setting {unknown[0]!r}", f"one of {', '.join(names)}", "check the spelling"
        )
    return Settings(**{name: listed(value) for name, value in options.items()})
