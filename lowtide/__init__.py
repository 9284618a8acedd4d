"""lowtide: post-training quantization for diffusion models that keeps their sense of time.

The face of the library; what it names is loaded on first use, so that `import lowtide` and `lowtide --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from lowtide.checkpoint.quantized_pipeline import Quantized as Quantized
    from lowtide.checkpoint.rescheduling import reschedule as reschedule
    from lowtide.errors import BadInput as BadInput
    from lowtide.evaluation.comparison import compare as compare
    from lowtide.evaluation.comparison import evaluate as evaluate
    from lowtide.methods import METHODS as METHODS
    from lowtide.models import adapt as adapt
    from lowtide.quantization import load as load
    from lowtide.quantization import quantize as quantize
    from lowtide.sampling import Request as Request
    from lowtide.sampling import images as images
    from lowtide.settings import Settings as Settings

__version__ = "0.1.0"

HOMES = {
    "BadInput": "lowtide.errors", "METHODS": "lowtide.methods", "adapt": "lowtide.models", "Settings": "lowtide.settings",
    "Quantized": "lowtide.checkpoint.quantized_pipeline", "load": "lowtide.quantization", "quantize": "lowtide.quantization",
    "Request": "lowtide.sampling", "images": "lowtide.sampling",
    "compare": "lowtide.evaluation.comparison", "evaluate": "lowtide.evaluation.comparison", "reschedule": "lowtide.checkpoint.rescheduling",
}  # fmt: skip
__all__ = [
    "METHODS", "BadInput", "Quantized", "Request", "Settings", "adapt", "compare", "evaluate", "images", "load", "quantize",
    "reschedule",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'lowtide' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


# diffusers learns of packed checkpoints the moment it imports its own table of quantizers, before or after lowtide.
wrapt.when_imported("diffusers.quantizers.auto")(
    lambda module: import_module("lowtide.checkpoint.diffusers_hook")
)
