"""The typed face of lowtide. Written by tools/face_stub.py; not by hand."""

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
MethodName = Literal["best", "minmax", "ptq4dm", "qdiffusion", "ptqd", "tfmq", "temporal_cache", "tcaq", "efficientdm", "mpq"]

def quantize(
    target: Model,
    *,
    method: MethodName = "best",
    folder: str | Path | None = None,
    without: Sequence[str] = (),
    fuse_lora: bool | str | Path = False,
    example: Mapping[str, torch.Tensor] | None = None,
    weights: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] = 4,
    inputs: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] = 8,
    group: int | None = None,
    profile: Literal["full", "paper", "tfmq", "qdiffusion", "ptq4dm", "ptqd", "efficientdm", "mpq"] = "full",
    ends: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] | None = None,
    end_inputs: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] | None = None,
    keep_float: Sequence[str] = (),
    softmax: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] | None = None,
    temporal: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] | None = None,
    temporal_inputs: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] | None = None,
    steps: int = 50,
    images: int = 32,
    calibration_steps: int = 25,
    prompts: Sequence[str] = (),
    labels: Sequence[int] = (),
    guidance: float | None = None,
    eta: float | None = None,
    scheduler: Literal["ddim", "ddpm", "pndm", "dpmsolver++", "unipc", "euler", "euler_a", "heun", "lms", "deis", "lcm"] | SchedulerMixin | None = None,
    spacing: Literal["leading", "trailing", "linspace", "quadratic"] | None = None,
    size: int | None = None,
    pictures: str | None = None,
    call: Mapping[str, object] = ...,
    seed: int = 0,
    memory: int = 134217728,
    iters: int = 1000,
    batch: int = 16,
    scope: Literal["block", "layer"] = "block",
    drop: float | None = None,
    range_iters: int = 0,
    early_stop: bool = False,
    only_schedule: bool = False,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    place: Literal["auto", "whole", "blocks"] = "auto",
    stages: Mapping[str, Mapping[str, object]] = ...,
) -> Quantized:
    """Quantize a diffusers pipeline, or a bare module, and return it packed.

    A pipeline or model that is passed is changed in place, on the device where it is. Under
    torchrun all processes call this alike, share the work out, and get the same result.

    Args:
        target: a pipeline, a model, or the name of one to load: a folder, a hub id, zoo:NAME.
        method: one of `lowtide.METHODS`.
        folder: where finished blocks are kept, so that an interrupted run resumes to the same bits.
        without: stages of the method's recipe to leave out, by name, to see what each is worth.
        fuse_lora: True adds the LoRA that is loaded to the weights before anything else; a file, a
            folder or a hub id names one to load first.
        example: the arguments of one call of a bare module, by name; `scheduler` is then a
            scheduler of diffusers. A UNet2DModel needs neither.

    The other keywords are the fields of `lowtide.Settings`: weights, inputs, steps, prompts,
    labels, iters, device and more. `stages` sets options of single stages, {"omq": {"plus": True}}.

    Returns:
        The pipeline with its packed denoiser (`.pipe`), the plan of its formats (`.plan`) and the
        report of the run (`.report`). `.save(folder)` writes it.

    Examples:
        >>> import lowtide
        >>> quantized = lowtide.quantize("zoo:digits", method="minmax", steps=2, images=2)
        >>> quantized.plan.summary["weights"], quantized.plan.summary["inputs"]
        (4, 8)
        >>> quantized.pipe(num_inference_steps=2).images[0].size
        (32, 32)
    """

def plan(
    source: str | Path,
    *,
    method: MethodName = "best",
    without: Sequence[str] = (),
    fit: str | int | None = None,
    card: str | None = None,
    weights: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] = 4,
    inputs: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] = 8,
    group: int | None = None,
    profile: Literal["full", "paper", "tfmq", "qdiffusion", "ptq4dm", "ptqd", "efficientdm", "mpq"] = "full",
    ends: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] | None = None,
    end_inputs: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] | None = None,
    keep_float: Sequence[str] = (),
    softmax: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] | None = None,
    temporal: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] | None = None,
    temporal_inputs: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] | None = None,
    steps: int = 50,
    images: int = 32,
    calibration_steps: int = 25,
    prompts: Sequence[str] = (),
    labels: Sequence[int] = (),
    guidance: float | None = None,
    eta: float | None = None,
    scheduler: Literal["ddim", "ddpm", "pndm", "dpmsolver++", "unipc", "euler", "euler_a", "heun", "lms", "deis", "lcm"] | None = None,
    spacing: Literal["leading", "trailing", "linspace", "quadratic"] | None = None,
    size: int | None = None,
    pictures: str | None = None,
    call: Mapping[str, object] = ...,
    seed: int = 0,
    memory: int = 134217728,
    iters: int = 1000,
    batch: int = 16,
    scope: Literal["block", "layer"] = "block",
    drop: float | None = None,
    range_iters: int = 0,
    early_stop: bool = False,
    only_schedule: bool = False,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    place: Literal["auto", "whole", "blocks"] = "auto",
    stages: Mapping[str, Mapping[str, object]] = ...,
) -> Estimate:
    """Predict size, peak memory and time of `quantize` with the same options.

    Args:
        source: a hub id (only its configuration is fetched), a local diffusers folder, zoo:NAME.
        method: one of `lowtide.METHODS`.
        without: stages to leave out.
        fit: the most bytes of the checkpoint, 500000 or "500kB"; it chooses the weights' bits.
        card: a card to reckon for that need not be here, such as "rtx4090". With a `device` that
            is here, the plan is for that one, by probes.

    The other keywords are the fields of `lowtide.Settings`.

    Returns:
        Bytes of the checkpoint by kind, seconds and peak memory, in all and by stage, and memory
        on the accelerator if there is one.

    Examples:
        >>> import lowtide
        >>> estimate = lowtide.plan("zoo:digits", weights=4)
        >>> estimate.size["total"] < estimate.float_bytes / 4
        True
    """

def evaluate(
    model: Model | Quantized,
    *,
    reference: Model | None = None,
    out: str | Path | None = None,
    gates: Mapping[str, float] | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    batch: int | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    scheduler: Literal["ddim", "ddpm", "pndm", "dpmsolver++", "unipc", "euler", "euler_a", "heun", "lms", "deis", "lcm"] | None = None,
    spacing: Literal["leading", "trailing", "linspace", "quadratic"] | None = None,
    size: int | None = None,
    pictures: str | None = None,
    call: Mapping[str, object] | None = None,
    metrics: Sequence[str] | None = None,
    dataset: str | None = None,
    min_psnr: float | None = None,
    max_lpips: float | None = None,
    max_fd_increase: float | None = None,
    device: str = "auto",
) -> Evaluation:
    """Compare a packed model with the float model it was made of, and write the evidence folder.

    Args:
        model: a packed folder, a pipeline, or lowtide.Quantized.
        reference: the float model; None is the one that the folder's lowtide.json names.
        out: the evidence folder; None is MODEL/evidence.
        gates: bounds such as {"min-psnr": 25.0, "max-lpips": 0.2, "max-fd-increase": 1.0}.

    The other keywords are the fields of `lowtide.EvaluationSettings`: `metrics`, by default psnr,
    ssim and latent_mse; `dataset`, a folder of images or an .npz file of Statistics, which some
    metrics need; `seeds`, by default 0 to 63; and steps, prompts, labels and more, by default as
    the model was quantized.

    Returns:
        The evidence, its folder, and the path of the report.

    Examples:
        >>> import lowtide, tempfile
        >>> quantized = lowtide.quantize("zoo:digits", method="minmax", steps=2, images=2)
        >>> folder = quantized.save(f"{tempfile.mkdtemp()}/packed")
        >>> result = lowtide.evaluate(folder, reference="zoo:digits", seeds=range(2))
        >>> result.report.name, result.evidence.models["minmax-w4a8"].psnr > 10
        ('report.html', True)
    """

def compare(
    *models: Model | Quantized,
    reference: Model | None = None,
    out: str | Path = "evidence",
    gates: Mapping[str, float] | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    batch: int | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    scheduler: Literal["ddim", "ddpm", "pndm", "dpmsolver++", "unipc", "euler", "euler_a", "heun", "lms", "deis", "lcm"] | None = None,
    spacing: Literal["leading", "trailing", "linspace", "quadratic"] | None = None,
    size: int | None = None,
    pictures: str | None = None,
    call: Mapping[str, object] | None = None,
    metrics: Sequence[str] | None = None,
    dataset: str | None = None,
    min_psnr: float | None = None,
    max_lpips: float | None = None,
    max_fd_increase: float | None = None,
    device: str = "auto",
) -> Evaluation:
    """Compare any float models, lowtide's checkpoints, and others that diffusers can load.

    Args:
        models: hub ids, folders, zoo:NAME, or loaded pipelines.
        reference: the model that all are compared with; None is the first float model, or the
            first model if none is in float.
        out: the evidence folder.

    The other arguments and the result are those of `evaluate`; None is the value with which the
    first packed model was quantized.

    Returns:
        The evidence, its folder, and the path of the report.

    Examples:
        >>> import lowtide, tempfile
        >>> quantized = lowtide.quantize("zoo:digits", method="minmax", steps=2, images=2)
        >>> place = f"{tempfile.mkdtemp()}/evidence"
        >>> result = lowtide.compare("zoo:digits", quantized, out=place, seeds=range(2))
        >>> list(result.evidence.models)
        ['digits-in-float', 'minmax-w4a8']
    """

def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    fused: bool = True,
    engine: Literal["native", "onednn", "plain"] | None = None,
    device: str = "auto",
    verify: Literal["full", "fast", "off"] = "full",
    factory: Callable[[], nn.Module] | None = None,
) -> DiffusionPipeline:
    """Load a pipeline, float or packed.

    Args:
        folder: a diffusers folder, a hub id, or zoo:NAME.
        dtype: of the weights that are not packed.
        fused: run a packed denoiser as one program of native kernels; else layer by layer.
        engine: what runs its products: "native" kernels, "onednn", or "plain" torch; None gives
            each shape the faster one. Engines run on the CPU.
        device: where the pipeline computes: "auto" (the accelerator there is), "cpu", "cuda",
            "cuda:1", "mps", "xpu".
        verify: "full" compares every file and tensor of a packed model with its hash; "fast" leaves
            the bytes of the tensors out; "off" compares nothing.
        factory: makes the float module of a bare module that was saved, such as its class.

    Returns:
        The diffusers pipeline; for a bare module, a pipeline around it (`.unet`).

    Examples:
        >>> import lowtide
        >>> type(lowtide.load("zoo:digits")).__name__
        'DDIMPipeline'
    """

def save(
    model: Quantized | DiffusionPipeline,
    folder: str | Path,
) -> Path:
    """Write a pipeline, float or packed, as an ordinary diffusers folder, whole or not at all.

    An older model in its place is replaced if lowtide wrote it and it holds no other files.

    Args:
        model: what `quantize` or `reschedule` returned, or a pipeline.
        folder: where it goes.

    Returns:
        The folder.

    Examples:
        >>> import lowtide, tempfile
        >>> place = tempfile.mkdtemp()
        >>> lowtide.save(lowtide.load("zoo:digits"), f"{place}/digits").name
        'digits'
    """

def unfused(
    model: Quantized | DiffusionPipeline | nn.Module,
) -> AbstractContextManager[None]:
    """Within the context, a packed denoiser runs layer by layer, in plain torch.

    Args:
        model: what `quantize` returned, a pipeline, or a denoiser.

    Examples:
        >>> import lowtide
        >>> pipe = lowtide.load("zoo:digits")
        >>> with lowtide.unfused(pipe):
        ...     images = pipe(num_inference_steps=1, output_type="np").images
    """

def export(
    target: DiffusionPipeline | Quantized | str | Path,
    folder: str | Path,
    *,
    to: Literal["float", "openvino", "onnx", "comfyui"],
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

def recalibrate(
    target: DiffusionPipeline | Quantized | str | Path,
    *,
    lora: str | Path | None = None,
    reference: DiffusionPipeline | Quantized | str | Path | None = None,
    request: Request | None = None,
    device: str = "auto",
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

def reschedule(
    target: DiffusionPipeline | Quantized | str | Path,
    steps: int,
    *,
    size: int | None = None,
    call: Mapping[str, object] | None = None,
    device: str = "auto",
) -> Quantized:
    """Make `steps` sampling steps of its pipeline's own scheduler a packed model's schedule.

    Cached temporal features are computed again by the block that the checkpoint keeps. Input ranges
    and corrections are interpolated between calibrated timesteps.

    Args:
        target: a folder that lowtide wrote, a packed pipeline, or what `lowtide.quantize` returned;
            the latter two are changed in place.
        steps: sampling steps of the new schedule.
        size: height and width of the images, for schedulers whose timesteps depend on it.
        call: more arguments of the pipeline's call, where it needs them, such as a picture.
        device: where a model that is named by path computes: "auto", "cpu", "cuda" and more.

    Returns:
        The pipeline, its new plan, and what was computed again.

    Examples:
        >>> import lowtide
        >>> quantized = lowtide.quantize("zoo:digits", method="tfmq", steps=4, images=2, iters=1)
        >>> lowtide.reschedule(quantized, 8).plan.summary["steps"]
        8
    """
