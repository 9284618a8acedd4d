"""Networks of a few layers, packed, to see what the runtime makes of them."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from lowtide import runtime
from lowtide.formats import Affine, minmax
from lowtide.kernels import native_library
from lowtide.nn.clock import find_clock
from lowtide.nn.plan import LayerPlan, Plan
from lowtide.nn.quantizer import input_format
from lowtide.nn.swap import pack_modules, quant_layers, quantize_modules
from lowtide.runtime.steps import Step, TorchStep

needs_library = pytest.mark.skipif(
    native_library.native().library is None, reason=native_library.native().reason
)
IMAGE = (2, 16, 6, 6)
TOKENS = (2, 10, 16)
ROUNDED_ALIKE = 2e-6
ONE_ROUNDING_APART = 3e-2


def conv(channels: int = 16, out: int = 16, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, out, **{"kernel_size": 3, "padding": 1} | options)


class Network(nn.Module):
    """Layers by name, and a function of them and of the sample that is the forward pass.

    `time` is what the function gets of the timestep: a vector (1, 16) that depends on nothing else.
    """

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = forward

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        angles = torch.arange(16, device=sample.device)
        time = (timestep.float().reshape(1, 1) / 1000 + angles).cos()
        return self.function(self.layers, sample, time)


def check_alike(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    """Some answer is within the bound; where a value rounds the other way, one is nearly so."""
    kinds = [[(each.shape, each.dtype) for each in answers] for answers in (found, expected)]
    assert kinds[0] == kinds[1]
    distances = list(map(distance, found, expected))
    assert min(distances) < bound, distances
    assert max(distances) < ONE_ROUNDING_APART, distances


class Fused:
    """A network, packed and fused, with the steps of its program."""

    def __init__(
        self,
        network: Network,
        *shape: int,
        samples: int = 4,
        inputs: int = 8,
        smooth: Mapping[str, Tensor] = {},
    ):
        """`smooth`: the divisors of some layers, by their names."""
        network.eval()
        calibration = [_sample(seed, shape) for seed in range(samples)]
        self.model = packed(network, calibration, inputs=inputs, smooth=smooth)
        self.samples = [_sample(seed, shape) for seed in range(samples)]
        runtime.fuse(self.model)

    @torch.no_grad()
    def answers(self) -> list[Tensor]:
        return answers(self.model, self.samples)

    def cast(self, dtype: torch.dtype) -> "Fused":
        """Its float parts and its samples in this type."""
        self.model.to(dtype)
        self.samples = [sample.to(dtype) for sample in self.samples]
        return self

    def check(self) -> "Fused":
        """Fused answers equal plain ones; where a value rounds the other way, nearly."""
        found = self.answers()
        assert runtime.explain(self.model), "it ran layer by layer"
        with runtime.plain(self.model):
            expected = self.answers()
        check_alike(found, expected, ROUNDED_ALIKE)
        return self

    @property
    def steps(self) -> list[Step | TorchStep]:
        fused = runtime.fused_forward(self.model)
        assert fused is not None
        [program] = fused.prepared().store.programs.values()
        return program.lowered.steps[program.lowered.conditional :]

    @property
    def names(self) -> list[str]:
        """Each step by its class, or by the name of its function of torch."""
        return [
            step.name if isinstance(step, TorchStep) else type(step).__name__.removesuffix("Step")
            for step in self.steps
        ]


@torch.no_grad()
def answers(model: nn.Module, samples: list[Tensor]) -> list[Tensor]:
    return [model(sample.clone(), torch.tensor(500)) for sample in samples]


def _sample(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def packed(
    model: nn.Module,
    samples: list[Tensor],
    *,
    inputs: int = 8,
    smooth: Mapping[str, Tensor] = {},
) -> nn.Module:
    """The model with 4-bit weights and inputs of these bits, whose ranges are the samples'."""
    kinds = (nn.Linear, nn.Conv2d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    layer = LayerPlan(Affine(4, signed=True, axis=0), input_format(inputs))
    quantize_modules(model, Plan(layers=dict.fromkeys(names, layer), timesteps=(500,)))
    for name, divisors in smooth.items():
        model.layers[name].set_smooth(divisors)
    ranges: dict[nn.Module, list[float]] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = module.rounded_input(args[0])
        ranges.setdefault(module, []).extend([x.min().item(), x.max().item()])

    layers = [module for _, module in quant_layers(model)]
    hooks = [module.register_forward_pre_hook(watch) for module in layers]
    for sample in samples:
        model(sample.clone(), torch.tensor(500))
    for hook in hooks:
        hook.remove()
    for module in layers:
        if module.input.format is not None:
            lowest = torch.tensor([min(ranges[module])])
            module.input.fit(lowest, torch.tensor([max(ranges[module])]))
        lo, hi = minmax(module.format.rows(module.smoothed_weight()), module.format)
        module.set_grid(module.format.params(lo, hi, module.weight.shape[0]))
    pack_modules(model)
    assert find_clock(model).known == {500: 0}
    return model.requires_grad_(requires_grad=False)
