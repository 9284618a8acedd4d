"""lowtide: post-training quantization for diffusion models that keeps their sense of time.

The face of the library. What it names is loaded on first use, so that `import lowtide` is quick.
Its types stand in `__init__.pyi`, which tools/face_stub.py writes.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt

__version__ = "0.1.0"

_HOMES = {
    "METHODS": "methods",
    "BadInput": "errors",
    "Estimate": "estimate",
    "Evaluation": "evaluation.comparison",
    "EvaluationSettings": "settings",
    "Exported": "exporting.targets",
    "LowtideConfig": "checkpoint.quantization_config",
    "Quantized": "checkpoint.quantized_pipeline",
    "Request": "settings",
    "Settings": "settings",
    "adapt": "models",
    "compare": "evaluation.comparison",
    "evaluate": "evaluation.comparison",
    "export": "exporting.targets",
    "images": "sampling",
    "load": "quantization",
    "plan": "estimate",
    "quantize": "quantization",
    "recalibrate": "checkpoint.recalibration",
    "reschedule": "checkpoint.rescheduling",
    "save": "checkpoint.quantized_pipeline",
    "unfused": "quantization",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowtide' has no attribute {name!r}")
    return getattr(import_module(f"lowtide.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


# diffusers learns of packed checkpoints when it imports its table of quantizers.
wrapt.when_imported("diffusers.quantizers.auto")(
    lambda module: import_module("lowtide.checkpoint.diffusers_hook")
)
# What of diffusers is wrapped when it is imported, and by which function of checkpoint/.
_WRAPPED = (
    # Folders that lowtide wrote are checked before diffusers reads them.
    ("diffusers.pipelines.pipeline_utils", "gate", "wrap_pipelines"),
    ("diffusers.models.modeling_utils", "gate", "wrap_models"),
    ("diffusers.models.modeling_utils", "belonging", "wrap"),
    ("diffusers.schedulers.scheduling_utils", "gate", "wrap_schedulers"),
    ("diffusers.models.controlnets.controlnet", "controlnets", "wrap"),
    ("diffusers.pipelines.pag.pag_utils", "perturbed_attention", "wrap"),
    ("diffusers.loaders.unet", "image_adapters", "wrap"),
    ("diffusers.utils.hub_utils", "hub_cards", "wrap"),
)


def _wrapped_by(home: str, name: str) -> Callable[[ModuleType], None]:
    return lambda module: getattr(import_module(f"lowtide.checkpoint.{home}"), name)(module)


for _theirs, _home, _wrapper in _WRAPPED:
    wrapt.when_imported(_theirs)(_wrapped_by(_home, _wrapper))
# peft learns of packed layers when it imports its LoRA.
wrapt.when_imported("peft.tuners.lora.model")(
    lambda module: import_module("lowtide.checkpoint.peft_hook")
)
