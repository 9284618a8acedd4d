"""One file per paper. METHODS maps a name to the function that gives its recipe."""

from collections.abc import Callable, Sequence
from types import ModuleType

from lowtide.errors import BadInput
from lowtide.methods import (
    best,
    efficientdm,
    minmax,
    mpq,
    ptq4dm,
    ptqd,
    qdiffusion,
    tcaq,
    temporal_cache,
    tfmq,
)
from lowtide.settings import Settings
from lowtide.stages.base import Recipe, ablated, checked, tuned

MODULES: dict[str, ModuleType] = {
    "best": best,
    "minmax": minmax,
    "ptq4dm": ptq4dm,
    "qdiffusion": qdiffusion,
    "ptqd": ptqd,
    "tfmq": tfmq,
    "temporal_cache": temporal_cache,
    "tcaq": tcaq,
    "efficientdm": efficientdm,
    "mpq": mpq,
}
METHODS: dict[str, Callable[[Settings], Recipe]] = {
    name: module.recipe for name, module in MODULES.items()
}
PAPERS: dict[str, str] = {
    name: (module.__doc__ or "").splitlines()[0] for name, module in MODULES.items()
}


def recipe_of(method: str, settings: Settings, without: Sequence[str] = ()) -> Recipe:
    """The stages of a method, with the options that the settings give them and without those left out."""
    if method not in METHODS:
        raise BadInput(
            f"found method {method!r}", f"one of {', '.join(METHODS)}", "see `lowtide methods`"
        )
    return checked(ablated(tuned(METHODS[method](settings), settings.stages), without), settings)


def methods() -> list[dict[str, str]]:
    """Every method and what it is."""
    return [{"name": name, "what": PAPERS[name]} for name in METHODS]
