"""One file per paper. METHODS maps the name of a method to the function that returns its recipe.

A method reads some settings and ignores others: minmax learns nothing and has no use for `iters`.
Each stage names the settings that it reads (`Stage.reads`). `recipe_of` refuses a setting that the
method ignores. `relevant_options` drops such settings, for a caller that runs several methods
with the same options.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
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
from lowtide.settings import Options, Settings, settings_from
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


# The profile that `paper` stands for: what the released code of the method's paper quantizes. There
# is no public code of TCAQ-DM and of Temporal Feature Matters: the former rounds attention as
# Q-Diffusion does, the latter goes on from TFMQ-DM.
PAPER_PROFILES = {
    "ptq4dm": "ptq4dm",
    "qdiffusion": "qdiffusion",
    "ptqd": "ptqd",
    "tfmq": "tfmq",
    "temporal_cache": "tfmq",
    "tcaq": "qdiffusion",
    "efficientdm": "efficientdm",
    "mpq": "mpq",
}

_DEFAULTS = Settings()
# Every recipe reads these: random numbers, memory, the device and what is on it, options.
_ALWAYS_READ = frozenset({"seed", "memory", "device", "dtype", "place", "stages"})


def with_profile(method: str, settings: Settings) -> Settings:
    """The settings with the name of a profile in the place of `paper`."""
    _check_method(method)
    if settings.profile != "paper":
        return settings
    if method not in PAPER_PROFILES:
        raise BadInput(
            f"found profile paper with {method}, which follows no paper's released code",
            f"a profile by name: full, {', '.join(dict.fromkeys(PAPER_PROFILES.values()))}",
            "name one of them",
        )
    return replace(settings, profile=PAPER_PROFILES[method])


def recipe_of(method: str, settings: Settings, without: Sequence[str] = ()) -> Recipe:
    """The stages of a method with these settings, except those left out.

    A setting that the whole method ignores is refused. A stage that is left out does not change
    which settings are accepted, so that an ablation needs no other settings.
    """
    _check_method(method)
    for name in _ignored(method, settings):
        readers = [other for other in METHODS if _reads(other, settings, name)]
        raise BadInput(
            f"found {name} {getattr(settings, name)} with {method}, which ignores it",
            f"one of the methods that read it: {', '.join(readers)}",
            f"leave {name} out, or choose another method",
        )
    return checked(ablated(tuned(METHODS[method](settings), settings.stages), without), settings)


def relevant_options(method: str, options: Mapping[str, object]) -> Options:
    """The options, without those that the method ignores."""
    _check_method(method)
    ignored = _ignored(method, settings_from(options))
    return {name: value for name, value in options.items() if name not in ignored}


def methods() -> list[dict[str, str]]:
    """Every method and what it is."""
    return [{"name": name, "what": PAPERS[name]} for name in METHODS]


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise BadInput(
            f"found method {method!r}", f"one of {', '.join(METHODS)}", "see `lowtide methods`"
        )


def _ignored(method: str, settings: Settings) -> list[str]:
    """Settings that differ from their default and that the method ignores."""
    names = [each.name for each in fields(Settings)]
    changed = [name for name in names if getattr(settings, name) != getattr(_DEFAULTS, name)]
    return [name for name in changed if not _reads(method, settings, name)]


def _reads(method: str, settings: Settings, name: str) -> bool:
    """Whether a stage of the method reads this setting, or the method chooses its stages by it."""
    recipe = METHODS[method](settings)
    if name in _ALWAYS_READ or any(name in stage.reads for stage in recipe):
        return True
    default = replace(settings, **{name: getattr(_DEFAULTS, name)})
    return METHODS[method](default) != recipe
