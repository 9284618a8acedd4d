"""Values that no quantization gives: of scales, zero points, factors, timesteps, float tensors.

Hashes cannot tell them, because they can be of a file that says so itself.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.formats import Adaptive, Affine, Format, Mixed, Stepped, flat_tables, most_bits
from lowtide.nn.clock import CLOCK, Clock, find_clock
from lowtide.nn.feature_cache import Cached
from lowtide.nn.packed import Packed
from lowtide.nn.plan import Plan
from lowtide.nn.swap import quantizers


def check_values(model: nn.Module, plan: Plan) -> None:
    """Raise for the first value of a packed model, in plain layers, that no quantization gives."""
    for problem in _problems(model, plan):
        raise BadInput(
            f"found that {problem}",
            "values that a quantization gives",
            "copy or download the checkpoint again, or quantize again",
        )


def value_problems(model: nn.Module, plan: Plan) -> list[str]:
    """Everything that no quantization gives in a packed model, in plain layers."""
    return list(_problems(model, plan))


def _problems(model: nn.Module, plan: Plan) -> Iterator[str]:
    if not _is_sound(model):
        yield from _named_problems(model)
    if CLOCK in model._modules:
        yield from _clock_problems(model, plan)


def _named_problems(model: nn.Module) -> Iterator[str]:
    """Tensor by tensor, which takes as long as the rest of loading."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            yield f"{name} holds NaN or infinity"
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            yield from (f"{name}: {problem}" for problem in _layer_problems(module))
        elif isinstance(module, Cached) and module.plan.format is not None:
            yield from (f"{name}: {problem}" for problem in _cache_problems(module))


def _is_sound(model: nn.Module) -> bool:
    """Whether `_named_problems` finds nothing, in one walk and a few calls."""
    floats: list[Tensor] = []
    layers: list[Packed] = []
    caches: list[Cached] = []
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        floats += [each for each in tensors if each is not None and each.is_floating_point()]
        if isinstance(module, Packed):
            layers.append(module)
        elif isinstance(module, Cached) and module.plan.format is not None:
            caches.append(module)
    are_caches = not any(any(_cache_problems(each)) for each in caches)
    return are_caches and _are_finite(floats) and _are_tables(layers)


def _layer_problems(layer: Packed) -> Iterator[str]:
    scale, zero, factor, smooth = layer.tables()
    yield from _scale_problems("a scale of its weights", scale)
    if smooth.numel():
        yield from _scale_problems("a divisor of its channels", smooth)
    bits = most_bits(layer.format)
    if zero.numel() and (zero.to(torch.int32) > _last_codes(layer.format, zero)).any():
        yield f"a zero point of its weights is beyond {bits} bits"
    if isinstance(layer.format, Affine) and factor.numel():
        most = layer.format.largest_factor
        if not ((factor >= 1) & (factor <= most)).all():
            yield f"a factor of its groups is not 1 to {most}"


def _last_codes(format: Format, like: Tensor) -> Tensor:
    """The last code of all channels, or of each."""
    if isinstance(format, Mixed):
        return format.levels(like).to(torch.int32) - 1
    return torch.tensor(2 ** most_bits(format) - 1, device=like.device)


def _cache_problems(cache: Cached) -> Iterator[str]:
    assert cache.plan.format is not None
    yield from _scale_problems("a scale of its features", cache.scale)
    if cache.zero.numel() and int(cache.zero.max()) > cache.plan.format.top:
        yield "a zero point of its features is beyond their bits"


def _clock_problems(model: nn.Module, plan: Plan) -> Iterator[str]:
    clock = find_clock(model)
    if tuple(clock.timesteps.tolist()) != plan.timesteps:
        yield f"{CLOCK}.timesteps, those of the tables, differ from those of the plan"
    if not clock.zero.numel():
        return
    inputs = quantizers(model)
    if _are_ranges(clock, [each.format for each in inputs.values()]):
        return
    for name, quantizer in inputs.items():
        owner = name.removesuffix(".input")
        ranges = _scale_problems("a scale of its input", clock.scale[quantizer.row])
        yield from (f"{owner}: {problem} ({CLOCK}.scale)" for problem in ranges)
        zero = clock.zero[quantizer.row].to(torch.int32)
        if zero.numel() and (zero > _last_zeros(quantizer.format, zero)).any():
            yield f"{owner}: a zero point of its input is beyond its bits ({CLOCK}.zero)"


def _are_finite(tensors: list[Tensor]) -> bool:
    """Whether all of these are finite, found in a few calls."""
    filled = [each for each in tensors if each.numel()]
    if not filled:
        return True
    norms = torch._foreach_norm(filled, torch.inf)  # pyright: ignore[reportPrivateImportUsage]
    largest = torch.stack([each.float() for each in norms])
    return bool(largest.isfinite().all())


def _are_tables(layers: list[Packed]) -> bool:
    """Whether no table of any layer can be wrong, found in a few calls."""
    positive: list[Tensor | None] = []
    below: dict[int, list[Tensor | None]] = {}  # tables of whole numbers by the last that may be
    above_zero: list[Tensor | None] = []
    for layer in layers:
        scale, zero, factor, smooth = flat_tables(layer.grid, layer.places)
        positive += [scale, smooth]
        if isinstance(layer.format, Mixed) and zero is not None:
            positive.append(layer.format.levels(zero).flatten() - zero)
        elif isinstance(layer.format, Affine):
            below.setdefault(2**layer.format.bits - 1, []).append(zero)
            below.setdefault(layer.format.largest_factor, []).append(factor)
            above_zero.append(factor)
    values = _joined(positive)
    fine = values.isfinite().all() and (values > 0).all() and (_joined(above_zero) > 0).all()
    return bool(fine) and all(int(_joined(each).max()) <= last for last, each in below.items())


def _joined(tables: list[Tensor | None]) -> Tensor:
    """The values of all tables; one that is always fine if there are none."""
    filled = [each for each in tables if each is not None]
    return torch.cat(filled) if filled else torch.ones(1, dtype=torch.uint8)


def _are_ranges(clock: Clock, formats: list[Format | None]) -> bool:
    """Whether no range of any input can be wrong, found in a few calls."""
    kinds = [each for each in formats if each is not None]
    least = min(
        (1 if isinstance(each, Adaptive) else _least_top(each) for each in kinds), default=0
    )
    fine = clock.scale.isfinite().all() and (clock.scale > 0).all()
    return bool(fine) and int(clock.zero.max()) <= least


def _least_top(format: Format) -> int:
    """The last code with the fewest bits that a format has."""
    return 2 ** (format.bits if isinstance(format.bits, int) else min(format.bits)) - 1


def _last_zeros(format: Format | None, like: Tensor) -> Tensor:
    """The last zero point of all steps, or of each. That of an adaptive format names a format."""
    assert format is not None
    if isinstance(format, Adaptive):
        return torch.tensor(1, device=like.device)
    if isinstance(format, Stepped):
        return format.tops(like)
    return torch.tensor(2 ** most_bits(format) - 1, device=like.device)


def _scale_problems(what: str, scale: Tensor) -> Iterator[str]:
    if not scale.isfinite().all():
        yield f"{what} is NaN or infinite"
    elif not (scale > 0).all():
        yield f"{what} is not positive"
