"""One run, from a model to a packed checkpoint: adapt, collect, assign, reconstruct, pack, save."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from lowtide import runtime, sampling
from lowtide.checkpoint import (
    adapters,
    bare_modules,
    diffusers_hook,
    file_format,
    folders,
    provenance,
)
from lowtide.checkpoint.facts import (
    digest_of_parts,
    fingerprint,
    float_share,
    kernels,
    parameter_bytes,
)
from lowtide.checkpoint.quantized_pipeline import Quantized, named_by
from lowtide.distributed.world import join
from lowtide.errors import BadInput
from lowtide.kernels.race import ENGINES
from lowtide.machine import devices
from lowtide.machine.device_names import AUTO
from lowtide.methods import recipe_of, with_profile
from lowtide.models.described import described
from lowtide.nn.clock import CLOCK
from lowtide.nn.plan import Plan, with_summary
from lowtide.nn.swap import packed_layers
from lowtide.sampling.pipelines import Pipeline, Scheduler
from lowtide.settings import Options, Settings, settings_from
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Recipe, recipe_digest, run_recipe
from lowtide.stages.collect import Collect, request_of
from lowtide.stages.conditions import applied
from lowtide.stages.pack import Pack
from lowtide.stages.placing import on_the_device
from lowtide.validation import takes_options_of


@takes_options_of(Settings)
def quantize(
    target: DiffusionPipeline | Pipeline | nn.Module | str | Path,
    *,
    method: str = "best",
    folder: str | Path | None = None,
    without: Sequence[str] = (),
    fuse_lora: bool | str | Path = False,
    example: Mapping[str, Tensor] | None = None,
    **options: object,
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
    if torch.is_inference_mode_enabled():
        raise BadInput(
            "found torch.inference_mode around quantize",
            "tensors that can have gradients",
            "call it outside, or within torch.no_grad()",
        )
    world = join()
    if folder is not None:
        world.of_first(lambda: _check_folder(Path(folder)))
    named = isinstance(target, str | Path)
    target = _whole(target, example, options)
    start = _started(target, method, without, options, fuse_lora=fuse_lora, ranks=world.size)
    pipe, model, settings, recipe, device, weights, digest = start
    world.check_alike(f"{digest} {folder is None}")
    units = Path(folder) / digest if folder else None

    adapter = sampling.pipeline_adapter(pipe, request_of(settings))
    for stage in recipe:
        stage.check_model(adapter, settings)
    plan = Plan(example=described(adapter.architecture))
    job = Job(pipe, model, adapter, settings, method, units, plan, world=world)
    job.report |= {"fingerprint": weights, "float_bytes": parameter_bytes(model)}
    job.report |= {"options": settings.stages, "device": str(device)}
    job.report |= {"ranks": world.size, "batch": job.batch, "run": digest}
    job.report |= {"source": provenance.lasting_source(str(target) if named else named_by(pipe))}
    job.report |= {"settings": asdict(settings), "without": list(without)}
    collect, assign, reconstruct, pack = _four_parts(recipe)
    kept_to = applied(job.conditions) if units else nullcontext()
    # A caller may have switched gradients off; learning needs them.
    with on_the_device(job, recipe, device, named=named), kept_to, torch.enable_grad():
        run_recipe(collect, job)
        run_recipe(assign, job)
        run_recipe(reconstruct, job)
        run_recipe(pack, job)
    return _finish(job)


def _whole(
    target: DiffusionPipeline | Pipeline | nn.Module | str | Path,
    example: Mapping[str, Tensor] | None,
    options: Options,
) -> DiffusionPipeline | Pipeline | nn.Module | str | Path:
    """A bare module in a pipeline, with the scheduler that leaves the options."""
    scheduler = options.get("scheduler")
    is_object = scheduler is not None and not isinstance(scheduler, str)
    if not is_object and example is None:
        return target
    own = cast(Scheduler, options.pop("scheduler")) if is_object else None
    return sampling.as_pipeline(target, own, example=None if example is None else dict(example))


class _Start(NamedTuple):
    """What a run begins with. `digest`: of all that its result depends on."""

    pipe: Pipeline
    model: nn.Module
    settings: Settings
    recipe: Recipe
    device: torch.device
    weights: str
    digest: str


def _started(
    target: DiffusionPipeline | Pipeline | nn.Module | str | Path,
    method: str,
    without: Sequence[str],
    options: Options,
    *,
    fuse_lora: bool | str | Path,
    ranks: int,
) -> _Start:
    """Load and check everything."""
    settings = with_profile(method, settings_from(options))
    recipe = recipe_of(method, settings, without)
    named = isinstance(target, str | Path)
    # A named model is loaded on the CPU. `on_the_device` moves it, whole or block by block.
    asked = devices.chosen(settings.device) if named else None
    loaded_on = devices.CPU.type if named else settings.device
    loaded = sampling.as_pipeline(target, device=loaded_on, dtype=settings.dtype)
    pipe = _sampled_by(loaded, settings)
    model = _float_model(pipe, fuse_lora=fuse_lora)
    device = asked or next(model.parameters()).device
    devices.check_own_card(device)
    weights = fingerprint(model)
    sources = f"{weights} {digest_of_parts(pipe)}"
    digest = recipe_digest(recipe, replace(settings, place=AUTO), sources, ranks)
    return _Start(pipe, model, settings, recipe, device, weights, digest)


def run_digest(
    source: str,
    method: str,
    options: Options,
    *,
    without: Sequence[str] = (),
    fuse_lora: bool | str | Path = False,
) -> str:
    """The hash of all that the result of `quantize` with these arguments depends on."""
    ranks = join().size
    return _started(source, method, without, options, fuse_lora=fuse_lora, ranks=ranks).digest


def _four_parts(recipe: Recipe) -> tuple[Recipe, Recipe, Recipe, Recipe]:
    """Cut a recipe after Collect, after Assign and before Pack, which every recipe contains.

    The parts record the calibration set, choose the formats of the layers, learn the scales,
    roundings and ranges, and write integer codes. Joined in this order they are the recipe.
    """
    kinds = [type(stage) for stage in recipe]
    collected = kinds.index(Collect) + 1
    assigned = kinds.index(Assign) + 1
    packing = kinds.index(Pack)
    return (
        recipe[:collected],
        recipe[collected:assigned],
        recipe[assigned:packing],
        recipe[packing:],
    )


def _check_folder(folder: Path) -> None:
    """Raise, before any work, where blocks could not be kept in this folder."""
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        fits = nearest.is_dir() and os.access(nearest, os.W_OK)
    except OSError:
        fits = False
    if not fits:
        raise BadInput(
            f"found that nothing can be kept in {folder}",
            "a folder that can be written",
            "give another folder",
        )


def _sampled_by(pipe: Pipeline, settings: Settings) -> Pipeline:
    """The pipeline with the sampler of the settings; changed in place where its class can stay."""
    other = sampling.scheduled(pipe, settings.scheduler, settings.spacing)
    if type(other) is type(pipe):
        pipe.scheduler = other.scheduler
        return pipe
    return other


def _float_model(pipe: Pipeline, *, fuse_lora: bool | str | Path) -> nn.Module:
    """The denoiser, once it is known that it can be quantized; in eval mode, without gradients."""
    model = sampling.denoiser(pipe)
    _check_float(model)
    adapters.settle_adapters(pipe, fuse_lora=fuse_lora)
    _check_finite(model)
    model.requires_grad_(False)
    return model.eval()


def _finish(job: Job) -> Quantized:
    """The plan's summary, the hook into diffusers, and the report."""
    plan = with_summary(job.plan, job.settings)
    if hasattr(job.model, "register_to_config"):
        diffusers_hook.attach(job.model, plan)
    else:
        diffusers_hook.attach_bare(job.model, plan)
    runtime.fuse(job.model)
    job.report["account"] = file_format.account(job.model)
    job.report["float"] = plan.left
    job.report["kernels"] = dict(Counter(kernels(job.model).values()))
    job.report["float_share"] = float_share(job)
    return Quantized(job.pipe, plan, job.report)


def _check_float(model: nn.Module) -> None:
    """A model that is not quantized yet, not even in part."""
    if getattr(model, "is_quantized", False) or any(packed_layers(model)):
        raise BadInput(
            "found a model that is quantized already", "a float model", "load the original"
        )
    if _is_partly_quantized(model):
        raise BadInput(
            "found a model that a quantization which failed left half-way",
            "a float model",
            "load the original again",
        )


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise BadInput(
                f"found NaN or infinity in {name}",
                "finite weights",
                "repair or download the model again",
            )


def _is_partly_quantized(model: nn.Module) -> bool:
    """Whether a quantization of this model began and failed before its layers were packed.

    Assign adds the clock to the model, and nothing removes it.
    """
    return hasattr(model, CLOCK)


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    fused: bool = True,
    engine: Literal["native", "onednn", "plain"] | None = None,
    device: str = AUTO,
    verify: file_format.Verification = "full",
    factory: Callable[[], nn.Module] | None = None,
) -> Pipeline:
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
    if not isinstance(dtype, torch.dtype):
        raise BadInput(f"found dtype {dtype!r}", "a dtype of torch", "give torch.float16")
    if engine not in (None, *ENGINES):
        raise BadInput(
            f"found engine {engine!r}", f"one of {', '.join(ENGINES)}", "leave engine out"
        )
    place = devices.CPU if engine and device == AUTO else devices.chosen(device)
    if engine and place != devices.CPU:
        raise BadInput(
            f"found engine {engine!r} with device {device!r}",
            "the CPU, on which the engines run",
            "leave one of them out",
        )
    if verify not in (amounts := get_args(file_format.Verification)):
        raise BadInput(f"found verify {verify!r}", f"one of {', '.join(amounts)}", "leave it out")
    folders.recover_missing(folder)
    with file_format.verifying(verify):
        if factory is None:
            pipe = sampling.load_pipeline(folder, dtype, place)
        else:
            pipe = bare_modules.load_bare(Path(folder), factory, dtype)
            pipe.unet.to(place)
    if not fused:
        runtime.unfuse(sampling.denoiser(pipe))
    elif engine is not None and runtime.is_fused(sampling.denoiser(pipe)):
        runtime.fuse(sampling.denoiser(pipe), engine)
    return pipe


@contextmanager
def unfused(model: Quantized | Pipeline | nn.Module) -> Iterator[None]:
    """Within the context, a packed denoiser runs layer by layer, in plain torch.

    Args:
        model: what `quantize` returned, a pipeline, or a denoiser.

    Examples:
        >>> import lowtide
        >>> pipe = lowtide.load("zoo:digits")
        >>> with lowtide.unfused(pipe):
        ...     images = pipe(num_inference_steps=1, output_type="np").images
    """
    if isinstance(model, Quantized):
        model = model.model
    root = model if isinstance(model, nn.Module) else sampling.denoiser(model)
    with runtime.plain(root):
        yield
