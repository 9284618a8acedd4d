"""CLIP and DINOv2 as extractors, and CLIP's reading of prompts, through transformers: a local folder or a hub id."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import pretrained
from lowtide.evaluation.metrics.feature_extraction import Extractor, Origin, centre

CLIP, DINO = "openai/clip-vit-base-patch16", "facebook/dinov2-base"
DINO_SIZE = 224
CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Clip(nn.Module):
    """Images in [0, 1] in, CLIP's projected image features out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.size = model, model.config.vision_config.image_size

    def forward(self, images: Tensor) -> tuple[Tensor, None, None]:
        seen = self.model.vision_model(coloured(centre(images, self.size), CLIP_COLOURS))
        return self.model.visual_projection(seen.pooler_output), None, None


class Dino(nn.Module):
    """Images in [0, 1] in, DINOv2's class token out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, None, None]:
        return (
            self.model(coloured(centre(images, DINO_SIZE), IMAGENET_COLOURS)).pooler_output,
            None,
            None,
        )


def coloured(x: Tensor, colours: tuple) -> Tensor:
    mean, deviation = (torch.tensor(each)[:, None, None] for each in colours)
    return (x - mean) / deviation


def load_clip(given: str | Path | None = None) -> Extractor:
    """CLIP, from a folder or hub id that is given, the cache's folder `clip`, or the hub."""
    place = home("clip", given, CLIP)
    model = loaded(transformers.CLIPModel, "clip", place)
    size = model.config.vision_config.image_size
    return Extractor(
        "clip",
        Clip(model),
        Origin(backend(place), pretrained.state_hash(model.state_dict()), resize(size)),
    )


def load_dino(given: str | Path | None = None) -> Extractor:
    """DINOv2, from a folder or hub id that is given, the cache's folder `dinov2`, or the hub."""
    place = home("dinov2", given, DINO)
    model = loaded(transformers.Dinov2Model, "dinov2", place)
    return Extractor(
        "dinov2",
        Dino(model),
        Origin(backend(place), pretrained.state_hash(model.state_dict()), resize(DINO_SIZE)),
    )


@torch.no_grad()
def read_prompts(extractor: Extractor, prompts: Sequence[str]) -> np.ndarray:
    """CLIP's projected text features, one row for each prompt; long ones are cut off as CLIP does."""
    model = extractor.net.model
    tokenizer = loaded(transformers.CLIPTokenizer, "clip", Path(model.name_or_path))
    longest = model.config.text_config.max_position_embeddings
    tokens = tokenizer(
        list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    return model.text_projection(model.text_model(**tokens).pooler_output).numpy()


def home(name: str, given: str | Path | None, hub: str) -> str:
    own = pretrained.folder() / name
    return str(given or (own if own.is_dir() else hub))


def loaded(kind: type, name: str, place: str | Path) -> nn.Module:
    """A model or tokenizer, or where to put it."""
    try:
        model = kind.from_pretrained(place)
    except (OSError, ValueError) as wrong:
        way_out = f"put a copy of it in {pretrained.folder() / name}, or give its folder"
        raise BadInput(
            f"found no weights for {name} at {place}", "a transformers folder or a hub id", way_out
        ) from wrong
    return model.eval().requires_grad_(False) if isinstance(model, nn.Module) else model


def backend(place: str) -> str:
    return f"transformers {transformers.__version__}, {Path(place).name}"


def resize(size: int) -> str:
    return f"bicubic, antialias, {size}, centre"
