"""The Inception network of FID, exactly as torch-fidelity runs it; no other network's distance may be called FID."""

from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import pretrained
from lowtide.evaluation.metrics.feature_extraction import SPATIAL_MAPS, Extractor, Origin

FILE = "weights-inception-2015-12-05-6726825d.pth"


class Inception(nn.Module):
    """Images in [0, 1] in; 2048 pooled features, the first maps of mixed_6/conv (sFID's), unbiased logits out."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.halfway = net, []
        net.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, maps: self.halfway.append(maps)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.halfway.clear()
        pooled, logits = self.net((images * 255).round().byte())
        return pooled, self.halfway.pop()[:, :SPATIAL_MAPS].flatten(1), logits


def load(given: str | Path | None = None) -> Extractor:
    """The extractor, from a file that is given, the cache, or torch-fidelity's own cache; nothing is downloaded."""
    path = pretrained.found(
        "inception (torch-fidelity's)", FILE, given, [pretrained.hub_cache() / FILE]
    )
    # torch-fidelity unpickles the file; read here first, so that it holds tensors and nothing else.
    pretrained.read(path)
    net = network()(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    backend = f"torch-fidelity {metadata.version('torch-fidelity')}"
    return Extractor(
        "inception",
        Inception(net).eval(),
        Origin(backend, pretrained.file_hash(path), "bilinear, TensorFlow 1, 299"),
    )


def network() -> Any:
    """torch-fidelity's class; the package is an extra, and needs a torchvision that fits torch."""
    try:
        return import_module("torch_fidelity").FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as wrong:
        way_out = "pip install 'lowtide[metrics]' with a torchvision made for this torch"
        raise BadInput(
            f"found no torch-fidelity that works ({wrong})", "it for inception", way_out
        ) from wrong
