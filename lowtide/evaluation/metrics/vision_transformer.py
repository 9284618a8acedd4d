"""CLIP and DINOv2 as extractors, and CLIP's text features: from a local folder or a hub id."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import pretrained
from lowtide.evaluation.metrics.feature_extraction import Extractor, Origin, centre

CLIP = "openai/clip-vit-base-patch16"
DINO = "facebook/dinov2-base"
DINO_SIZE = 224
# Means and standard deviations of the colour channels.
CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Loaded = TypeVar("Loaded")


class ClipNet(nn.Module):
    """Input: images in [0, 1]. Outputs: CLIP's projected image features, None, None."""

    def __init__(self, model: Any):  # transformers gives a CLIPModel's parts no types.
        super().__init__()
        self.model = model
        self.size: int = model.config.vision_config.image_size

    def forward(self, images: Tensor) -> tuple[Tensor, None, None]:
        x = _normalized(centre(images, self.size), CLIP_COLOURS)
        return self.model.visual_projection(self.model.vision_model(x).pooler_output), None, None


class DinoNet(nn.Module):
    """Input: images in [0, 1]. Outputs: DINOv2's class token, None, None."""

    def __init__(self, model: Any):  # transformers gives a Dinov2Model's call no types.
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, None, None]:
        x = _normalized(centre(images, DINO_SIZE), IMAGENET_COLOURS)
        return self.model(x).pooler_output, None, None


def _normalized(x: Tensor, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, deviation = (x.new_tensor(channel)[:, None, None] for channel in colours)
    return (x - mean) / deviation


def load_clip(weights: str | Path | None = None) -> Extractor:
    """CLIP, from a given folder or hub id, the cache's folder `clip`, or the hub."""
    source = _source("clip", weights, CLIP)
    net = ClipNet(_loaded(transformers.CLIPModel.from_pretrained, "clip", source))
    return Extractor("clip", _frozen(net), _origin(net, source, net.size))


def load_dino(weights: str | Path | None = None) -> Extractor:
    """DINOv2, from a given folder or hub id, the cache's folder `dinov2`, or the hub."""
    source = _source("dinov2", weights, DINO)
    net = DinoNet(_loaded(transformers.Dinov2Model.from_pretrained, "dinov2", source))
    return Extractor("dinov2", _frozen(net), _origin(net, source, DINO_SIZE))


@torch.no_grad()
def read_prompts(extractor: Extractor, prompts: Sequence[str]) -> np.ndarray:
    """CLIP's projected text features, (prompts, features); long prompts are cut as CLIP does."""
    net = extractor.net
    assert isinstance(net, ClipNet), "only CLIP reads prompts"
    model = net.model
    tokenizer = _loaded(transformers.CLIPTokenizer.from_pretrained, "clip", model.name_or_path)
    longest = model.config.text_config.max_position_embeddings
    tokens = tokenizer(
        list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    features = model.text_model(**tokens.to(extractor.device)).pooler_output
    return model.text_projection(features).cpu().numpy()


def _source(name: str, weights: str | Path | None, hub: str) -> str:
    """The given folder or hub id, else the cache's folder, else the hub id."""
    cached = pretrained.folder() / name
    return str(weights or (cached if cached.is_dir() else hub))


def _loaded(from_pretrained: Callable[[str], Loaded], name: str, source: str) -> Loaded:
    """A model or a tokenizer; without it, an error that says where to put it."""
    try:
        return from_pretrained(source)
    except (OSError, ValueError) as error:
        wrong = f"found no weights for {name} at {source}"
        way_out = f"put a copy of it in {pretrained.folder() / name}, or give its folder"
        raise BadInput(wrong, "a transformers folder or a hub id", way_out) from error


def _frozen(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False)


def _origin(net: ClipNet | DinoNet, source: str, size: int) -> Origin:
    backend = f"transformers {transformers.__version__}, {Path(source).name}"
    weights = pretrained.state_hash(net.model.state_dict())
    return Origin(backend, weights, f"bicubic, antialias, {size}, centre")
