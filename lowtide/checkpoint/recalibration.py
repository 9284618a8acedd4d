"""Input ranges again, for a packed model with a LoRA: weights and their codes stay as they are.

A LoRA changes what enters the layers, and a strong one sends values beyond the ranges that were
measured without it. The model draws its calibration images once more, with the LoRA beside its
layers and with inputs in float, and each range is fitted to what is seen: the whole range where
inputs have more than 4 bits, else the range of least squared error. A method's ranges that were
learnt by gradients are replaced as well.

The mean error of the answer (Bias of PTQD) is a difference from the float model, so it is measured
again where the float model with the LoRA is given, and stays where it is not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from lowtide import runtime, sampling
from lowtide.checkpoint import adapters, facts, file_format, folders, provenance
from lowtide.checkpoint.quantized_pipeline import Quantized
from lowtide.errors import BadInput
from lowtide.formats import most_bits
from lowtide.machine.device_names import AUTO
from lowtide.models import answer_of
from lowtide.nn.attention import QuantAttention
from lowtide.nn.clock import Clock, find_clock
from lowtide.nn.correction import CORRECTION, Correction, channel_axis
from lowtide.nn.layer_call import on_input
from lowtide.nn.packed import Packed
from lowtide.nn.precision import Precision
from lowtide.nn.swap import quantizers, set_precision
from lowtide.sampling.pipelines import Pipeline
from lowtide.settings import Request
from lowtide.stages.fit_ranges import ranges
from lowtide.stages.value_statistics import InputStatistics
from lowtide.validation import as_tuple

Target = str | Path | DiffusionPipeline | Pipeline | Quantized
# Far from the seeds that a user draws with, and from those of the first calibration.
SEEDS = tuple(range(3_000_000_007, 3_000_000_007 + 16))
COARSE_BITS = 4
_RECORDED = ("prompts", "labels", "guidance", "eta", "size", "pictures", "call")


def recalibrate(
    target: Target,
    *,
    lora: str | Path | None = None,
    reference: Target | None = None,
    request: Request | None = None,
    device: str = AUTO,
) -> Quantized:
    """Fit the input ranges of a packed model again, with the LoRA that is loaded or fused in it.

    Args:
        target: a folder that lowtide wrote, a packed pipeline, or what `lowtide.quantize` returned;
            the latter two are changed in place.
        lora: a file, a folder or a hub id to load first.
        reference: the float pipeline with the same LoRA. With it, the images are the float model's
            and the mean error of the answer is measured again.
        request: the images to draw; 16 with the steps of the plan if not given.
        device: where a model that is named by path computes: "auto", "cpu", "cuda" and more.

    Returns:
        The pipeline, its plan, and how far the ranges moved.

    Examples:
        >>> import lowtide
        >>> quantized = lowtide.quantize("zoo:digits", method="minmax", steps=2, images=2)
        >>> request = lowtide.Request(steps=2, seeds=(7, 8))
        >>> lowtide.recalibrate(quantized, request=request).report["inputs"] > 50
        True
    """
    pipe = (
        target.pipe
        if isinstance(target, Quantized)
        else sampling.as_pipeline(target, device=device)
    )
    if lora is not None:
        adapters.load_lora(pipe, lora)
    model = sampling.denoiser(pipe)
    plan = facts.packed_plan(model)
    if not plan.summary:
        raise BadInput(
            "found no model that lowtide packed", "a packed one", "quantize it with fuse_lora=True"
        )
    source = target if isinstance(target, str | Path) else None
    chosen = request or _recorded_request(source, cast(int, plan.summary["steps"]))
    other = None if reference is None else _float_pipeline(reference, device)
    before = find_clock(model).scale.clone()
    fitted = _fit(pipe, chosen, other)
    corrected = bool(plan.corrected) and other is not None
    if corrected:
        _correct(cast(Pipeline, other), model, chosen)
    report = {
        "inputs": fitted,
        "widest": float((find_clock(model).scale / before).max()),
        "narrowest": float((find_clock(model).scale / before).min()),
        "bias": "measured again" if corrected else ("kept" if plan.corrected else "none"),
        "account": file_format.account(model),
    }
    return Quantized(pipe, plan, report)


def _recorded_request(source: str | Path | None, steps: int) -> Request:
    """The images of the calibration, with other seeds."""
    record = None if source is None else provenance.read(sampling.local_folder(source))
    settings = record.settings if record else {}
    names = [name for name in _RECORDED if settings.get(name) not in (None, [], {})]
    fields: dict[str, Any] = {name: as_tuple(settings[name]) for name in names}
    return Request(steps=steps, seeds=SEEDS, **fields)


def _float_pipeline(reference: Target, device: str) -> Pipeline:
    pipe = (
        reference.pipe
        if isinstance(reference, Quantized)
        else sampling.as_pipeline(reference, device=device)
    )
    if facts.packed_plan(sampling.denoiser(pipe)).summary:
        raise BadInput("found a packed model as reference", "the float model", "give the original")
    return pipe


@torch.no_grad()
def _fit(pipe: Pipeline, request: Request, reference: Pipeline | None) -> int:
    """Fit every range to the inputs of these images; the number of ranges."""
    model = sampling.denoiser(pipe)
    clock = find_clock(model)
    steps = len(clock.known) or 1
    known = quantizers(model)
    statistics = {name: InputStatistics.empty(steps, clock.scale.device) for name in known}
    generator = torch.Generator().manual_seed(0)
    with _float_inputs(model), _watching(model, clock, statistics, generator):
        for moment in _moments(reference or pipe, request):
            if reference is not None:
                model(**moment.arguments)
    for name, quantizer in known.items():
        if statistics[name].called:
            assert quantizer.format is not None
            search = "mse" if most_bits(quantizer.format) <= COARSE_BITS else "minmax"
            quantizer.fit(*ranges(statistics[name], quantizer, search))
    # Other tensors tell the programs of the runtime that the ranges are others.
    clock.scale = clock.scale.clone()
    clock.zero = clock.zero.clone()
    return len(known)


def _moments(pipe: Pipeline, request: Request) -> Iterator[Any]:
    for batch in request.batches():
        yield from sampling.trajectory(pipe, batch)


@contextmanager
def _float_inputs(model: nn.Module) -> Iterator[None]:
    """Within the context, the model runs layer by layer with packed weights and float inputs."""
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    with runtime.plain(model):
        set_precision(model, Precision.WEIGHTS)
        for module in model.modules():
            if isinstance(module, QuantAttention):
                module.active = True  # it calls its quantizers, which round nothing
        for layer in packed:
            layer.input.enabled = False
        try:
            yield
        finally:
            set_precision(model, Precision.FULL)
            for layer in packed:
                layer.input.enabled = True


@contextmanager
def _watching(
    model: nn.Module,
    clock: Clock,
    statistics: dict[str, InputStatistics],
    generator: torch.Generator,
) -> Iterator[None]:
    """Within the context, the statistics see what each quantizer would round."""
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in statistics}

    def adding(name: str) -> Callable[[nn.Module, Tensor], None]:
        def add(module: nn.Module, given: Tensor) -> None:
            x = module.smoothed(given) if isinstance(module, Packed) else given
            step = int(clock.index) if clock.keyed else 0
            statistics[name].add(x, step, generator)

        return add

    hooks = []
    for name, owner in owners.items():
        watched = owner if isinstance(owner, Packed) else model.get_submodule(name)
        hooks.append(on_input(watched, adding(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _correct(reference: Pipeline, model: nn.Module, request: Request) -> None:
    """Measure the mean error of the answer by step and channel, as Bias of PTQD does."""
    clock = find_clock(model)
    correction = cast(Correction, model.get_submodule(CORRECTION))
    correction.bias = torch.zeros_like(correction.bias)
    errors: dict[int, list[Tensor]] = {}
    for moment in _moments(reference, request):
        noise = answer_of(model(**moment.arguments)) - moment.eps
        axis = channel_axis(noise)
        channels = noise.movedim(axis, 0)[: correction.bias.shape[1]]
        errors.setdefault(int(clock.index), []).append(channels.flatten(1).double().mean(1))
    for step, means in errors.items():
        mean = torch.stack(means).mean(0).to(correction.bias)
        correction.bias[step] = mean * (1 + correction.slope[step])


def recalibrate_to_folder(
    source: str | Path,
    out: str | Path,
    *,
    lora: str | None = None,
    reference: str | None = None,
    device: str = AUTO,
) -> dict[str, object]:
    """Load, recalibrate, fuse the LoRA into side branches, save."""
    out = Path(out)
    folders.recover_missing(source)
    home = sampling.local_folder(source)
    with folders.written_beside(out, source=home) as fresh:
        float_pipe = None if reference is None else sampling.as_pipeline(reference, device=device)
        if float_pipe is not None and lora is not None:
            adapters.load_lora(float_pipe, lora)
        result = recalibrate(source, lora=lora, reference=float_pipe, device=device)
        adapters.settle_adapters(result.pipe, fuse_lora=True)
        result.report["account"] = file_format.account(result.model)
        result.write(fresh)
        report: dict[str, object] = {"model": str(source), "folder": str(out), "lora": lora}
        report |= {"method": result.plan.method, "on_disk": facts.on_disk(fresh)}
        report |= result.plan.summary | result.report
        if record := provenance.read(home):
            added = {"side_lora": provenance.lasting_file(lora)} if lora else {}
            settings = record.settings | added
            again = replace(
                record,
                command=provenance.command(),
                settings=settings,
                report=record.report | {"recalibrated": report},
            )
            again.write(fresh)
    return report
