"""What is wrong with a folder that lowtide wrote: files, headers, tensors and their values."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lowtide import runtime, sampling
from lowtide.checkpoint import folders
from lowtide.checkpoint.bare_modules import bare_problems
from lowtide.checkpoint.manifest import MANIFEST, altered
from lowtide.errors import BadInput
from lowtide.formats import most_bits
from lowtide.nn.clock import CLOCK, find_clock
from lowtide.nn.packed import Packed
from lowtide.nn.plan import Plan
from lowtide.nn.swap import packed_layers, quantizers
from lowtide.sampling.loading import module_facts


def problems_of(folder: Path) -> list[str]:
    """Everything that is wrong, a sentence each. An empty list: the folder is whole."""
    if not folder.is_dir():
        raise BadInput(f"found no folder {folder}", "one that lowtide wrote", "check the path")
    folders.recover_missing(folder, verify=False)
    if not (folder / MANIFEST).is_file():
        raise BadInput(
            f"found no {MANIFEST} in {folder}", "a folder that lowtide wrote", "check the path"
        )
    found = [
        f"{name} {'was altered' if (folder / name).exists() else 'is missing'}"
        for name in altered(folder)
    ]
    if module_facts(folder) is not None:
        return [*found, *bare_problems(folder)]
    try:
        with sampling.quiet_libraries():
            pipe = sampling.load_pipeline(folder, torch.float32, torch.device("cpu"))
    except BadInput as error:
        return [*found, str(error)]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        words = str(error).partition("\n")[0]
        return [*found, f"diffusers cannot load it ({type(error).__name__}: {words})"]
    return [*found, *value_problems(sampling.denoiser(pipe))]


def value_problems(model: nn.Module) -> list[str]:
    """Values that no quantization gives: of scales, zero points, timesteps and float tensors."""
    runtime.unfuse(model)
    found = [
        f"{name} holds NaN or infinity"
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    for name, layer in packed_layers(model):
        found += [f"{name}: {problem}" for problem in _layer_problems(layer)]
    if CLOCK in dict(model.named_children()):
        found += _clock_problems(model)
    return found


def _layer_problems(layer: Packed) -> Iterator[str]:
    scale, zero, _, smooth = layer.tables()
    yield from _scale_problems("a scale of its weights", scale)
    if smooth.numel():
        yield from _scale_problems("a divisor of its channels", smooth)
    bits = most_bits(layer.format)
    if zero.numel() and int(zero.max()) >= 2**bits:
        yield f"a zero point of its weights is beyond {bits} bits"


def _clock_problems(model: nn.Module) -> Iterator[str]:
    clock = find_clock(model)
    plan: Plan | None = getattr(getattr(model, "hf_quantizer", None), "plan", None)
    if plan is not None and tuple(clock.timesteps.tolist()) != plan.timesteps:
        yield "the timesteps of the plan and of the tables differ"
    for name, quantizer in quantizers(model).items():
        owner = name.removesuffix(".input")
        ranges = _scale_problems("a scale of its input", clock.scale[quantizer.row])
        yield from (f"{owner}: {problem}" for problem in ranges)
        assert quantizer.format is not None
        if int(clock.zero[quantizer.row].max()) >= 2 ** most_bits(quantizer.format):
            yield f"{owner}: a zero point of its input is beyond its bits"


def _scale_problems(what: str, scale: Tensor) -> Iterator[str]:
    if not scale.isfinite().all():
        yield f"{what} is NaN or infinite"
    elif not (scale > 0).all():
        yield f"{what} is not positive"
