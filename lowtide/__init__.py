"""lowtide: post-training quantization for diffusion models that keeps their sense of time.

The face of the library; what it names is loaded on first use, so that `import lowtide` and `lowtide --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from lowtide.errors import BadInput as BadInput
    from lowtide.evidence import compare as compare
    from lowtide.evidence import evaluate as evaluate
    from lowtide.methods import METHODS as METHODS
    from lowtide.models import adapt as adapt
    from lowtide.plan import Settings as Settings
    from lowtide.run import Quantized as Quantized
    from lowtide.run import load as load
    from lowtide.run import quantize as quantize
    from lowtide.sample import Request as Request
    from lowtide.sample import images as images
    from lowtide.schedule import reschedule as reschedule

__version__ = "0.1.0"

HOMES = {
    "BadInput": "lowtide.errors", "METHODS": "lowtide.methods", "adapt": "lowtide.models", "Settings": "lowtide.plan",
    "Quantized": "lowtide.run", "load": "lowtide.run", "quantize": "lowtide.run",
    "Request": "lowtide.sample", "images": "lowtide.sample",
    "compare": "lowtide.evidence", "evaluate": "lowtide.evidence", "reschedule": "lowtide.schedule",
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
wrapt.when_imported("diffusers.quantizers.auto")(lambda module: import_module("lowtide.diffusers_hook"))
