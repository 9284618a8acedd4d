"""The Inception network of FID as torch-fidelity runs it; only its distance may be called FID."""

from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import pretrained
from lowtide.evaluation.metrics.feature_extraction import SPATIAL_MAPS, Extractor, Origin

FILE = "weights-inception-2015-12-05-6726825d.pth"


class Inception(nn.Module):
    """torch-fidelity's network with the outputs of an extractor.

    Input: images in [0, 1]. Outputs: 2048 pooled features, the first maps of mixed_6/conv (the
    layer of sFID), unbiased logits.
    """

    def __init__(self, net: Any):  # torch-fidelity has no types.
        super().__init__()
        self.net = net
        self.mixed_6: list[Tensor] = []
        net.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, maps: self.mixed_6.append(maps)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.mixed_6.clear()
        pooled, logits = self.net((images * 255).round().byte())
        return pooled, self.mixed_6.pop()[:, :SPATIAL_MAPS].flatten(1), logits


def load(weights: str | Path | None = None) -> Extractor:
    """The extractor, from a given file, the cache, or torch-fidelity's own cache.

    Nothing is downloaded.
    """
    fallbacks = [pretrained.hub_cache() / FILE]
    path = pretrained.weights_file("inception (torch-fidelity's)", FILE, weights, fallbacks)
    # torch-fidelity unpickles the file; this read makes sure that it holds only tensors.
    pretrained.read(path)
    features = ["2048", "logits_unbiased"]
    net = _network()("inception", features, feature_extractor_weights_path=str(path))
    backend = f"torch-fidelity {metadata.version('torch-fidelity')}"
    origin = Origin(backend, pretrained.file_hash(path), "bilinear, TensorFlow 1, 299")
    return Extractor("inception", Inception(net).eval(), origin)


def _network() -> Any:
    """torch-fidelity's class; the package is optional and needs a torchvision that fits torch."""
    try:
        return import_module("torch_fidelity").FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        wrong = f"found no torch-fidelity that works ({error})"
        way_out = "pip install 'lowtide[metrics]' with a torchvision made for this torch"
        raise BadInput(wrong, "it for inception", way_out) from error
