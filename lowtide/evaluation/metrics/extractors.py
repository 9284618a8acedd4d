"""All feature extractors, by name."""

from pathlib import Path

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import efficientnet, inception, vision_transformer
from lowtide.evaluation.metrics.feature_extraction import Extractor

EXTRACTORS = {
    "efficientnet": efficientnet.load,
    "inception": inception.load,
    "clip": vision_transformer.load_clip,
    "dinov2": vision_transformer.load_dino,
}


def load_extractor(name: str, weights: str | Path | None = None) -> Extractor:
    """An extractor with its weights, from a given path or from the cache's folder."""
    if name not in EXTRACTORS:
        names = ", ".join(EXTRACTORS)
        raise BadInput(f"found extractor {name!r}", f"one of {names}", "choose one of them")
    return EXTRACTORS[name](weights)
