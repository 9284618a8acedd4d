"""`lowtide.export`: a packed pipeline as files of another runtime, with what that loses."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from lowtide import runtime, sampling
from lowtide.checkpoint import facts, folders, provenance
from lowtide.checkpoint.quantized_pipeline import Quantized, named_by
from lowtide.errors import BadInput
from lowtide.exporting import to_comfyui, to_float, to_onnx, to_openvino
from lowtide.exporting.free_batch import FreeBatch
from lowtide.exporting.traceable import TracedDenoiser, running_step_kept, traceable
from lowtide.exporting.trial_calls import (
    BATCH,
    answers_of,
    arrays,
    example_calls,
    relative_error,
)
from lowtide.models import Arguments
from lowtide.models.trace import flat_inputs
from lowtide.nn.plan import Plan
from lowtide.sampling.pipelines import Pipeline

TargetName = Literal["float", "openvino", "onnx", "comfyui"]
RECORD = "lowtide-export.json"
EXPORT_MARKS = (RECORD,)


@dataclass(frozen=True)
class Exported:
    """What was written.

    error: the relative L2 between the answers of the export and of the packed denoiser, over a few
        calls at calibrated timesteps.
    weight_bytes, packed_bytes: of the denoiser's files, and of the packed denoiser's tensors.
    lost: what the export does not have, one sentence each.
    """

    to: TargetName
    folder: Path
    error: float
    weight_bytes: int
    packed_bytes: int
    lost: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"folder": str(self.folder), "lost": list(self.lost)}


@dataclass(frozen=True)
class _Source:
    """What is exported: the pipeline, its packed denoiser and plan, and a few calls of it."""

    pipe: Pipeline
    model: nn.Module
    plan: Plan
    reference: nn.Module | None

    @property
    def place(self) -> str:
        """The name of the denoiser's folder."""
        return sampling.denoiser_name(self.pipe)


class _Written:
    """What a target says of its files: its answers to calls, the losses, the weight files."""

    def __init__(self, answers: Sequence[Tensor], lost: Sequence[str], weights: Sequence[Path]):
        self.answers = answers
        self.lost = tuple(lost)
        self.weight_bytes = sum(path.stat().st_size for path in weights)


def export(
    target: str | Path | DiffusionPipeline | Pipeline | Quantized,
    folder: str | Path,
    *,
    to: TargetName,
    reference: str | Path | None = None,
) -> Exported:
    """Write a packed pipeline as files of another runtime, whole or not at all.

    Args:
        target: a folder that lowtide wrote, a packed pipeline, or what `quantize` returned.
        folder: where the files go. An older result there is replaced if lowtide wrote it.
        to: "float", a diffusers folder of float weights; "openvino"; "onnx"; "comfyui".
        reference: the float model. Only a checkpoint of one schedule needs it, and only in float.

    Returns:
        How far the export's answers are from the packed ones, its size, and what it lost.

    Examples:
        >>> import lowtide, tempfile
        >>> quantized = lowtide.quantize("zoo:digits", method="minmax", steps=2, images=2)
        >>> exported = lowtide.export(quantized, tempfile.mkdtemp() + "/float", to="float")
        >>> exported.error < 0.1
        True
    """
    if to not in (names := get_args(TargetName)):
        raise BadInput(f"found the target {to!r}", f"one of {', '.join(names)}", "correct it")
    source = _source(target, reference)
    calls = example_calls(source.model, source.plan)
    home = sampling.local_folder(target) if isinstance(target, str | Path) else None
    with folders.written_beside(Path(folder), EXPORT_MARKS, source=home) as fresh:
        written = WRITERS[to](source, calls, fresh)
        with runtime.plain(source.model):
            expected = answers_of(source.model, calls)
        exported = Exported(
            to=to,
            folder=Path(folder),
            error=relative_error(written.answers, expected),
            weight_bytes=written.weight_bytes,
            packed_bytes=_packed_bytes(source),
            lost=written.lost,
        )
        _record(exported, provenance.lasting_source(_name_of(target, source.pipe)), fresh)
    return exported


def _source(target: Any, reference: str | Path | None) -> _Source:
    """Load and check everything."""
    if isinstance(target, str | Path):
        folders.recover_missing(target)
    named = isinstance(target, str | Path)
    pipe = sampling.as_pipeline(target, device="cpu") if named else cast(Pipeline, target)
    if isinstance(target, Quantized):
        pipe = target.pipe
    model = sampling.denoiser(pipe)
    plan = facts.packed_plan(model)
    if not plan.summary:
        raise BadInput(
            "found no model that lowtide packed",
            "a packed one",
            "quantize it and export the result",
        )
    _check_float32(model)
    floating = None if reference is None else sampling.as_pipeline(reference, device="cpu")
    other = None if floating is None else sampling.denoiser(floating)
    return _Source(pipe, model, plan, other)


def _check_float32(model: nn.Module) -> None:
    """The graph is traced on the CPU, in float32."""
    floats = (each for each in model.parameters() if each.is_floating_point())
    kinds = sorted({f"{each.dtype} on {each.device.type}" for each in floats})
    if kinds != ["torch.float32 on cpu"]:
        raise BadInput(
            f"found a model in {' and '.join(kinds)}",
            "float32 on the CPU",
            "give the folder instead of the loaded pipeline",
        )


def _name_of(target: Any, pipe: Pipeline) -> str:
    return str(target) if isinstance(target, str | Path) else named_by(pipe)


def _packed_bytes(source: _Source) -> int:
    return sum(tensor.nbytes for tensor in source.model.state_dict().values())


def _record(exported: Exported, name: str, fresh: Path) -> None:
    """Write what the export is and what it lost beside its files."""
    record = {"source": name, "command": provenance.command(), **exported.as_json()}
    text = json.dumps(record | {"folder": exported.folder.name}, indent=1)
    (fresh / RECORD).write_text(text + "\n", encoding="utf-8")


def _to_float(source: _Source, calls: Sequence[Arguments], fresh: Path) -> _Written:
    twin = to_float.float_twin(source.model, source.plan, source.reference)
    to_float.write(source.pipe, twin, fresh)
    weights = list((fresh / source.place).glob("*.safetensors"))
    return _Written(answers_of(twin, calls), to_float.losses(source.plan), weights)


def _to_openvino(source: _Source, calls: Sequence[Arguments], fresh: Path) -> _Written:
    place = _traced(source, calls[0], to_openvino.write, fresh)
    answers = to_openvino.answers(place, [arrays(call) for call in calls])
    return _graph_written(source, answers, [place / name for name in to_openvino.FILES])


def _to_onnx(source: _Source, calls: Sequence[Arguments], fresh: Path) -> _Written:
    place = _traced(source, calls[0], to_onnx.write, fresh)
    answers = to_onnx.answers(place, [arrays(call) for call in calls])
    return _graph_written(source, answers, [place / name for name in to_onnx.FILES])


def _graph_written(
    source: _Source, answers: Sequence[np.ndarray], weights: Sequence[Path]
) -> _Written:
    tensors = [torch.from_numpy(each) for each in answers]
    return _Written(tensors, graph_losses(source.plan), weights)


def _traced(source: _Source, call: Arguments, write: Callable[..., None], fresh: Path) -> Path:
    """Write the graph of the denoiser, and beside it all other parts; the denoiser's folder."""
    place = _other_parts(source, fresh)
    flat = flat_inputs(call)
    architecture = facts.float_adapter(source.model, source.plan).architecture
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(traceable(source.model))
        stack.enter_context(running_step_kept(source.model))
        stack.enter_context(FreeBatch())
        denoiser = TracedDenoiser(source.model, call, architecture, BATCH).eval()
        write(denoiser, tuple(flat.values()), place)
    return place


def graph_losses(plan: Plan) -> list[str]:
    """What a graph of operators does not have, one sentence each."""
    lost = ["Height and width are fixed; the batch is free."]
    if plan.keyed:
        lost.append("A timestep that the model was not calibrated for gives NaN, and no error.")
    if odd := sorted(_bits(plan) - {4, 8}):
        widths = " and ".join(map(str, odd))
        lost.append(f"Weights of {widths} bits take 4 bits of the file, or 8 if they are wider.")
    if any(request.cache for request in plan.requests.values()):
        lost.append("Features of a request are computed at each call and are not rounded.")
    return lost


def _bits(plan: Plan) -> set[int]:
    """The bit-widths of weights."""
    found: set[int] = set()
    for layer in plan.layers.values():
        if layer.weight is not None:
            bits = layer.weight.bits
            found |= {bits} if isinstance(bits, int) else set(bits)
    return found


def _other_parts(source: _Source, fresh: Path) -> Path:
    """Write every part of the pipeline but the denoiser's weights; the denoiser's folder."""
    pipe = cast(DiffusionPipeline, source.pipe)
    place = fresh / source.place
    kind = cast(Any, type(source.model))
    config: Mapping[str, Any] = cast(Any, source.model).config
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    with sampling.quiet_libraries(), torch.device("meta"):
        empty = kind.from_config(plain)
    with sampling.quiet_libraries():
        pipe.save_config(fresh)
        empty.save_config(place)
        for name, part in pipe.components.items():
            if name != source.place and hasattr(part, "save_pretrained"):
                part.save_pretrained(fresh / name)
    return place


def _to_comfyui(source: _Source, calls: Sequence[Arguments], fresh: Path) -> _Written:
    to_comfyui.check(source.model)
    twin = to_float.float_twin(source.model, source.plan, source.reference)
    integers = to_comfyui.integer_weights(source.model, twin, source.plan)
    path = fresh / to_comfyui.FILE
    to_comfyui.write(twin, integers, path)
    answers = answers_of(to_comfyui.as_run(twin, integers), calls)
    lost = to_comfyui.losses(source.plan, integers) + to_float.losses(source.plan)[1:]
    return _Written(answers, lost, [path])


WRITERS: Mapping[str, Callable[[_Source, Sequence[Arguments], Path], _Written]] = {
    "float": _to_float,
    "openvino": _to_openvino,
    "onnx": _to_onnx,
    "comfyui": _to_comfyui,
}
