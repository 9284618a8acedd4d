"""Write lowtide/__init__.pyi, the typed face: `python tools/face_stub.py`.

With --check it only compares. Options are spelled once, in the dataclasses of lowtide/settings.py.
An editor and a type checker need them as keyword parameters, so the stub repeats them, and a test
holds the two equal.
"""

import ast
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from lowtide.settings import EvaluationSettings, MethodName, Settings

PACKAGE = Path(__file__).parents[1] / "lowtide"
STUB = PACKAGE / "__init__.pyi"
SOURCES = {
    "quantize": "quantization.py",
    "load": "quantization.py",
    "save": "checkpoint/quantized_pipeline.py",
    "plan": "estimate/prediction.py",
    "evaluate": "evaluation/comparison.py",
    "compare": "evaluation/comparison.py",
    "export": "exporting/targets.py",
    "recalibrate": "checkpoint/recalibration.py",
    "reschedule": "checkpoint/rescheduling.py",
    "unfused": "quantization.py",
}
HEAD = '''"""The typed face of lowtide. Written by tools/face_stub.py; not by hand."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from lowtide.checkpoint.quantization_config import LowtideConfig as LowtideConfig
from lowtide.checkpoint.quantized_pipeline import Quantized as Quantized
from lowtide.errors import BadInput as BadInput
from lowtide.estimate import Estimate as Estimate
from lowtide.evaluation.comparison import Evaluation as Evaluation
from lowtide.exporting.targets import Exported as Exported
from lowtide.methods import METHODS as METHODS
from lowtide.models import adapt as adapt
from lowtide.sampling import images as images
from lowtide.settings import EvaluationSettings as EvaluationSettings
from lowtide.settings import Request as Request
from lowtide.settings import Settings as Settings

__version__: str

Model = DiffusionPipeline | nn.Module | str | Path
MethodName = {methods}
'''
GATES = "gates: Mapping[str, float] | None = None"
FUNCTIONS = {
    "quantize": (
        ["target: Model"],
        [
            'method: MethodName = "best"',
            "folder: str | Path | None = None",
            "without: Sequence[str] = ()",
            "fuse_lora: bool | str | Path = False",
            "example: Mapping[str, torch.Tensor] | None = None",
        ],
        Settings,
        "Quantized",
    ),
    "plan": (
        ["source: str | Path"],
        [
            'method: MethodName = "best"',
            "without: Sequence[str] = ()",
            "fit: str | int | None = None",
            "card: str | None = None",
        ],
        Settings,
        "Estimate",
    ),
    "evaluate": (
        ["model: Model | Quantized"],
        ["reference: Model | None = None", "out: str | Path | None = None", GATES],
        EvaluationSettings,
        "Evaluation",
    ),
    "compare": (
        ["*models: Model | Quantized"],
        ["reference: Model | None = None", 'out: str | Path = "evidence"', GATES],
        EvaluationSettings,
        "Evaluation",
    ),
    "load": (
        ["folder: str | Path"],
        [
            "dtype: torch.dtype = torch.float32",
            "fused: bool = True",
            'engine: Literal["native", "onednn", "plain"] | None = None',
            'device: str = "auto"',
            'verify: Literal["full", "fast", "off"] = "full"',
            "factory: Callable[[], nn.Module] | None = None",
        ],
        None,
        "DiffusionPipeline",
    ),
    "save": (["model: Quantized | DiffusionPipeline", "folder: str | Path"], [], None, "Path"),
    "unfused": (
        ["model: Quantized | DiffusionPipeline | nn.Module"],
        [],
        None,
        "AbstractContextManager[None]",
    ),
    "export": (
        ["target: DiffusionPipeline | Quantized | str | Path", "folder: str | Path"],
        [
            'to: Literal["float", "openvino", "onnx", "comfyui"]',
            "reference: str | Path | None = None",
        ],
        None,
        "Exported",
    ),
    "recalibrate": (
        ["target: DiffusionPipeline | Quantized | str | Path"],
        [
            "lora: str | Path | None = None",
            "reference: DiffusionPipeline | Quantized | str | Path | None = None",
            "request: Request | None = None",
            'device: str = "auto"',
        ],
        None,
        "Quantized",
    ),
    "reschedule": (
        ["target: DiffusionPipeline | Quantized | str | Path", "steps: int"],
        [
            "size: int | None = None",
            "call: Mapping[str, object] | None = None",
            'device: str = "auto"',
        ],
        None,
        "Quantized",
    ),
}


def spelled(kind: Any) -> str:
    """A field's type as a signature has it, without bounds."""
    origin = get_origin(kind)
    if origin is Annotated:
        return spelled(get_args(kind)[0])
    if isinstance(kind, UnionType) or type(None) in get_args(kind):
        return " | ".join(spelled(part) for part in get_args(kind))
    if kind is type(None):
        return "None"
    if origin is Literal:
        return f"Literal[{', '.join(map(literal, get_args(kind)))}]"
    if origin is Sequence:
        return f"Sequence[{spelled(get_args(kind)[0])}]"
    if origin is Mapping:
        return f"Mapping[{', '.join(spelled(part) for part in get_args(kind))}]"
    return "Any" if kind is Any else kind.__name__


def literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def options(model: type) -> list[str]:
    """A keyword parameter for each field; defaults are the dataclass's own."""
    hints = get_type_hints(model, include_extras=True)
    return [
        f"{field.name}: {spelled(hints[field.name])} = {default(field)}" for field in fields(model)
    ]


def default(field: Field[Any]) -> str:
    """A plain default as it is written; a long or mutable one is left to the dataclass."""
    plain = field.default is None or isinstance(field.default, int | float | str)
    return repr(field.default).replace("'", '"') if plain or field.default == () else "..."


def function(name: str) -> str:
    positional, keywords, model, result = FUNCTIONS[name]
    keywords = [*keywords, *(options(model) if model else [])]
    if name == "quantize":
        keywords = [with_scheduler(line) for line in keywords]
    star = [] if positional[0].startswith("*") or not keywords else ["*"]
    lines = "".join(f"    {line},\n" for line in [*positional, *star, *keywords])
    return f'\ndef {name}(\n{lines}) -> {result}:\n    """{docstring(name)}"""\n'


def with_scheduler(keyword: str) -> str:
    """The keyword `scheduler`, which for a bare module takes the scheduler itself."""
    is_name = keyword.startswith("scheduler:")
    return keyword.replace("] | None", "] | SchedulerMixin | None") if is_name else keyword


def docstring(name: str) -> str:
    """The docstring of the function itself, as it is written."""
    module = ast.parse((PACKAGE / SOURCES[name]).read_text())
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    (function,) = [node for node in functions if node.name == name]
    return ast.get_docstring(function, clean=False) or ""


def stub() -> str:
    methods = f"Literal[{', '.join(map(literal, get_args(MethodName)))}]"
    return HEAD.replace("{methods}", methods) + "".join(map(function, FUNCTIONS))


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(STUB.read_text() != stub())
    STUB.write_text(stub())
