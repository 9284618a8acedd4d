"""Names of metrics: a distance has its extractor's name, and only Inception's is called FID."""

from lowtide.errors import BadInput
from lowtide.evaluation.metrics.extractors import EXTRACTORS
from lowtide.evaluation.metrics.metric_definitions import METRICS
from lowtide.settings import DATASET_METRIC_NAMES, METRIC_NAMES

INCEPTION = "inception"
# The names of these metrics in the literature, which are valid for Inception's features only.
INCEPTION_NAMES = {"fd": "fid", "sfd": "sfid", "kd": "kid", "is": "is"}


def full_name(plain: str, extractor: str) -> str:
    """The full name of a metric: fd -> fd-efficientnet, or fid with Inception."""
    if not METRICS[plain].named_after_extractor:
        return plain
    return INCEPTION_NAMES[plain] if extractor == INCEPTION else f"{plain}-{extractor}"


def names_with(extractor: str) -> dict[str, str]:
    """All names of metrics with an extractor, short and full -> the plain name."""
    own = [plain for plain in METRICS if plain != "is" or extractor == INCEPTION]
    return {plain: plain for plain in own} | {full_name(plain, extractor): plain for plain in own}


def plain_name(name: str, extractor: str) -> str:
    """The plain name of a metric, which must be one that this extractor can compute."""
    names = names_with(extractor)
    if name in names:
        return names[name]
    if others := [other for other in EXTRACTORS if name in names_with(other)]:
        wrong = f"found {name} with the extractor {extractor}"
        short_names = ", ".join(short for short in INCEPTION_NAMES if short in names)
        way_out = f"choose it, or ask for {short_names}"
        raise BadInput(wrong, f"the extractor {others[0]}", way_out)
    # `measure` gets images, so it has no latent_mse.
    known = [other for other in (*METRIC_NAMES, *DATASET_METRIC_NAMES) if other != name]
    raise BadInput(f"found metric {name!r}", f"one of {', '.join(known)}", "choose some of them")


def extractor_of(name: str) -> str | None:
    """The extractor that a metric's name implies: Inception for fid, DINOv2 for fd-dinov2."""
    if name in METRICS and name != "is":
        return None
    return next((extractor for extractor in EXTRACTORS if name in names_with(extractor)), None)
