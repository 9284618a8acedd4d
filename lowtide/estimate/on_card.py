"""Memory on an accelerator and time there: probed where there is one, reckoned where not."""

import time
from dataclasses import dataclass, replace

import torch

from lowtide.costs import FLOAT, Network, Speed, Workload
from lowtide.costs.card import BLOCKS, CONTEXT, WHOLE, CardWeights
from lowtide.costs.speed import measured_on
from lowtide.errors import BadInput
from lowtide.estimate.cards import ASSUMED, CARDS, LINK, DataSheet
from lowtide.estimate.result import CardEstimate, CardFit
from lowtide.machine import devices
from lowtide.machine.device_names import AUTO, KINDS
from lowtide.sampling.loading import DTYPES
from lowtide.settings import Settings
from lowtide.stages.base import Recipe
from lowtide.stages.placing import in_parts, stage_bytes

HALF = 2
TRIED = ((FLOAT, WHOLE), (HALF, WHOLE), (FLOAT, BLOCKS), (HALF, BLOCKS))


@dataclass(frozen=True)
class PlannedDevice:
    """What a plan is for: an accelerator that is here, or a card that is reckoned.

    device: none where the card is reckoned. asked: a card was named.
    """

    device: torch.device | None
    card: DataSheet | None = None
    asked: bool = True

    @property
    def name(self) -> str:
        if self.card is not None:
            return self.card.name
        assert self.device is not None
        return devices.describe(self.device)

    @property
    def described(self) -> str:
        """The first line of a plan."""
        if self.card is None:
            return self.name
        here = "" if self.asked else "cuda is not here, so this plan assumes an "
        return f"{here}{self.name}, reckoned by its data sheet (--card)"

    @property
    def memory(self) -> int | None:
        """Bytes of memory, as far as they are known."""
        if self.card is not None:
            return self.card.memory
        assert self.device is not None
        known = devices.free_memory(self.device)
        return known and known[0]

    def speed(self, network: Network, width: int) -> Speed:
        """Seconds of each kind of work, probed or reckoned."""
        if self.card is not None:
            return self.card.speed(width)
        assert self.device is not None
        return measured_on(network, self.device, time.perf_counter)


def target_of(device: str, card: str | None) -> PlannedDevice | None:
    """The accelerator to plan for; None for the CPU."""
    if card is not None:
        if card not in CARDS:
            raise BadInput(f"found card {card!r}", f"one of {', '.join(CARDS)}", "correct --card")
        return PlannedDevice(None, CARDS[card])
    kind = device.partition(":")[0]
    if kind == "cuda" and kind in KINDS and not torch.cuda.is_available():
        return PlannedDevice(None, CARDS[ASSUMED], asked=False)
    place = devices.chosen(device)
    return None if place == devices.CPU else PlannedDevice(place)


def width_of(settings: Settings) -> int:
    """Bytes of a float weight."""
    return DTYPES[settings.dtype].itemsize


def dtype_of(settings: Settings) -> str:
    """The type of the float weights, spelled out."""
    return str(DTYPES[settings.dtype]).removeprefix("torch.")


def card_estimate(
    target: PlannedDevice, recipe: Recipe, load: Workload, others: dict[str, int]
) -> CardEstimate:
    """The peak on the card for each way to place the model, and the way that a run would choose.

    others: bytes of each other part in float32.
    """
    fits = tuple(_fit(target, recipe, load, others, width, place) for width, place in TRIED)
    dtype = dtype_of(load.settings)
    own = [fit for fit in fits if fit.bytes_of_a_weight == load.width]
    whole = next(fit for fit in own if fit.place == WHOLE)
    place = load.settings.place
    if place == AUTO:
        place = BLOCKS if whole.fits is False else WHOLE
    chosen = next(fit for fit in own if fit.place == place)
    weights = CardWeights.of(load.network, load.width)
    moved = (weights.all - weights.outside) if place == BLOCKS else 0
    return CardEstimate(
        name=target.name,
        reckoned=target.card is not None,
        assumed=not target.asked,
        memory=target.memory,
        ways=fits,
        dtype=dtype,
        place=place,
        peak_bytes=chosen.peak_bytes,
        parts_bytes=chosen.parts_bytes,
        fits=chosen.fits,
        largest_unit=max(part.weights for part in load.network.by_unit.values()),
        moving_seconds=round((2 * load.calls + 3) * moved / LINK, 1),
    )


def _fit(
    target: PlannedDevice,
    recipe: Recipe,
    load: Workload,
    others: dict[str, int],
    width: int,
    place: str,
) -> CardFit:
    parts = [count * width // FLOAT for count in others.values()]
    load = replace(load, width=width)
    weights = CardWeights.of(load.network, width)

    def peak(load: Workload) -> int:
        stages = stage_bytes(recipe, load, parts)
        return round(CONTEXT + max(weights.peak(place, stage) for stage in stages))

    memory = target.memory
    return CardFit(
        bytes_of_a_weight=width,
        place=place,
        peak_bytes=peak(load),
        parts_bytes=peak(in_parts(load)),
        fits=None if memory is None else peak(in_parts(load)) <= memory,
    )
