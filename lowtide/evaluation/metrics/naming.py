"""What a metric is called: a distance tells its extractor, and only Inception's may be called FID."""

from lowtide.errors import BadInput
from lowtide.evaluation.metrics.cases import METRICS
from lowtide.evaluation.metrics.extractors import EXTRACTORS

INCEPTION = "inception"
# What literature calls these metrics when, and only when, Inception looks.
OF_INCEPTION = {"fd": "fid", "sfd": "sfid", "kd": "kid", "is": "is"}


def title(plain: str, extractor: str) -> str:
    """The full name: fd -> fd-efficientnet, or fid with Inception."""
    if not METRICS[plain].named_after:
        return plain
    return OF_INCEPTION[plain] if extractor == INCEPTION else f"{plain}-{extractor}"


def offered(extractor: str) -> dict[str, str]:
    """Every name that may be asked for with an extractor, short or full, and the metric behind it."""
    own = [plain for plain in METRICS if plain != "is" or extractor == INCEPTION]
    return {plain: plain for plain in own} | {title(plain, extractor): plain for plain in own}


def plain_name(name: str, extractor: str) -> str:
    """The metric behind a name, which must be one that this extractor may give."""
    if name in offered(extractor):
        return offered(extractor)[name]
    if others := [other for other in EXTRACTORS if name in offered(other)]:
        way_out = f"choose it, or ask for {', '.join(short for short in OF_INCEPTION if short in offered(extractor))}"
        raise BadInput(
            f"found {name} with the extractor {extractor}", f"the extractor {others[0]}", way_out
        )
    raise BadInput(f"found metric {name!r}", f"one of {', '.join(METRICS)}", "choose some of them")
