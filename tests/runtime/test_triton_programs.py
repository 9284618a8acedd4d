"""Programs of Triton kernels equal the layers one by one, for every kind of step and network.

Without a CUDA card, the denoiser stays on the CPU and the kernels run in Triton's interpreter.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fused_networks import (
    IMAGE,
    ONE_ROUNDING_APART,
    TOKENS,
    Fused,
    Network,
    answers,
    check_alike,
    conv,
    distance,
)
from torch import Tensor, nn
from triton_layers import DEVICE

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.errors import OutOfResources
from triton_interpreter import interpret

from lowtide import runtime
from lowtide.errors import BadInput
from lowtide.nn.clock import find_clock
from lowtide.nn.swap import quantizers
from lowtide.runtime.steps import GemmStep, StreamStep, TorchStep

EXACT = 2e-6  # where no value rounds the other way, because a sum ends in another last digit
HALF = 3e-2  # bfloat16: between two layers, the program rounds less often


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch, columns=32)


class OnCard:
    """A network, packed, with its answers as a program and layer by layer."""

    def __init__(self, network: Network, *shape: int, **options):
        made = Fused(network, *shape, samples=2, **options)
        self.model = made.model.to(DEVICE)
        self.samples = [sample.to(DEVICE) for sample in made.samples]

    def check(self, bound: float = EXACT) -> "OnCard":
        found = answers(self.model, self.samples)
        assert runtime.explain(self.model), "it ran layer by layer"
        with runtime.plain(self.model):
            expected = answers(self.model, self.samples)
        check_alike(found, expected, bound)
        return self

    @property
    def steps(self) -> list:
        fused = runtime.fused_forward(self.model)
        assert fused is not None
        assert fused.programs is not None
        [program] = fused.programs.store.programs.values()
        return program.lowered.steps[program.lowered.conditional :]

    @property
    def names(self) -> list[str]:
        return [
            step.name if isinstance(step, TorchStep) else type(step).__name__.removesuffix("Step")
            for step in self.steps
        ]


def resnet(layers: nn.ModuleDict, x: Tensor, time: Tensor) -> Tensor:
    y = layers["first"](F.silu(F.group_norm(x, 4)))
    y = y + layers["time"](F.silu(time).to(x.dtype))[:, :, None, None]
    return (x + layers["second"](F.silu(F.group_norm(y, 4)))) / 2


def skip(layers: nn.ModuleDict, x: Tensor, time: Tensor) -> Tensor:
    both = torch.cat([layers["down"](x), x], 1)
    return layers["first"](F.silu(F.group_norm(both, 4))) + layers["shortcut"](both)


def sampled(layers: nn.ModuleDict, x: Tensor, time: Tensor) -> Tensor:
    small = layers["strided"](F.pad(layers["first"](x), (0, 1, 0, 1)))
    return layers["last"](F.interpolate(small, scale_factor=2.0, mode="nearest"))


def geglu(layers: nn.ModuleDict, x: Tensor, time: Tensor) -> Tensor:
    hidden, gate = layers["wide"](F.layer_norm(x, (16,))).chunk(2, -1)
    return x + layers["narrow"](hidden * F.gelu(gate))


def modulated(layers: nn.ModuleDict, x: Tensor, time: Tensor) -> Tensor:
    gain, shift, gate = layers["time"](F.silu(time).to(x.dtype)).chunk(3, -1)
    y = F.layer_norm(x, (16,)) * (1 + gain[:, None]) + shift[:, None]
    y = layers["narrow"](F.gelu(layers["wide"](y), approximate="tanh"))
    return x + gate[:, None] * y


def read_twice(layers: nn.ModuleDict, x: Tensor, time: Tensor) -> Tensor:
    y = F.layer_norm(x, (16,))
    return layers["first"](y) + y.relu() + layers["second"](x)


def normed(layers: nn.ModuleDict, x: Tensor, time: Tensor) -> Tensor:
    """A norm that torch reads, so it stores floats."""
    return layers["only"](F.group_norm(x, 4).relu())


RESNET = {"first": conv, "second": conv, "time": lambda: nn.Linear(16, 16)}
NETWORKS: dict[str, tuple[Callable, dict[str, Callable[[], nn.Module]], tuple[int, ...]]] = {
    "resnet": (resnet, RESNET, IMAGE),
    "odd resnet": (
        resnet,
        {"first": lambda: conv(12, 12), "second": lambda: conv(12, 12, dilation=2, padding=2)}
        | {"time": lambda: nn.Linear(16, 12)},
        (3, 12, 5, 7),
    ),
    "normed": (normed, {"only": conv}, IMAGE),
    "skip": (skip, {"down": conv, "first": lambda: conv(32), "shortcut": lambda: conv(32)}, IMAGE),
    "sampled": (
        sampled,
        {"first": conv, "strided": lambda: conv(stride=2, padding=0), "last": conv},
        IMAGE,
    ),
    "geglu": (
        geglu,
        {"wide": lambda: nn.Linear(16, 2 * 40), "narrow": lambda: nn.Linear(40, 16)},
        TOKENS,
    ),
    "modulated": (
        modulated,
        {"wide": lambda: nn.Linear(16, 40), "narrow": lambda: nn.Linear(40, 16)}
        | {"time": lambda: nn.Linear(16, 48)},
        TOKENS,
    ),
    "read twice": (
        read_twice,
        {"first": lambda: nn.Linear(16, 16), "second": lambda: nn.Linear(16, 16)},
        TOKENS,
    ),
}
EXPECTED = {
    "resnet": "Moments Stream Gemm Moments Stream Gemm",
    "odd resnet": "Moments Stream Gemm Moments Stream Gemm",
    "normed": "Moments Stream relu Stream Gemm",
    "skip": "Stream Gemm Moments Stream Stream Gemm Gemm",
    "sampled": "Stream Gemm Stream Gemm Stream Gemm",
    "geglu": "LayerNorm Gemm Stream Gemm",
    "modulated": "LayerNorm Gemm Gemm",
    "read twice": "LayerNorm relu Stream Gemm Gemm",
}


def built(kind: str, **options) -> OnCard:
    function, layers, shape = NETWORKS[kind]
    return OnCard(
        Network(function, **{name: make() for name, make in layers.items()}), *shape, **options
    )


@pytest.mark.parametrize("kind", NETWORKS)
def test_each_kind_of_step(kind):
    found = built(kind).check()
    assert " ".join(found.names) == EXPECTED[kind]


@pytest.mark.parametrize("kind", ["resnet", "modulated"])
def test_a_model_in_half_precision_keeps_its_type_between_layers(kind):
    found = built(kind)
    found.model.to(torch.bfloat16)
    found.samples = [sample.to(torch.bfloat16) for sample in found.samples]
    found.check(HALF)
    stored = [step.output.view.meta.dtype for step in found.steps if isinstance(step, GemmStep)]
    assert set(stored) <= {torch.bfloat16, torch.int8}
    assert torch.bfloat16 in stored


def test_divided_inputs_of_a_product_that_stores_codes():
    divisors = torch.rand(40) + 0.5
    found = built("modulated", smooth={"narrow": divisors}).check()
    assert " ".join(found.names) == EXPECTED["modulated"]


def test_the_epilogue_and_the_codes_of_a_block():
    found = built("modulated")
    found.check()
    first, second = [step for step in found.steps if isinstance(step, GemmStep)]
    assert first.output.rounding is not None
    assert second.gate is not None
    assert second.residual is not None
    resnets = built("resnet").check()
    first, second = [step for step in resnets.steps if isinstance(step, GemmStep)]
    assert first.per_sample is not None
    assert second.residual is not None
    assert second.factor == 0.5
    streams = [step for step in resnets.steps if isinstance(step, StreamStep)]
    assert all(step.outputs[0].rounding is not None for step in streams)


def test_what_has_no_kernel_runs_in_torch_with_its_reason():
    found = OnCard(
        Network(
            lambda layers, x, time: layers["last"](layers["first"](x).relu()),
            first=conv(),
            last=conv(groups=2),
        ),
        *IMAGE,
    )
    with pytest.warns(UserWarning, match="its channels are in 2 groups"):
        found.check()
    told = runtime.explain(found.model)
    assert told["unsupported"] == {"layers.last": "its channels are in 2 groups"}
    assert told["kernels"] == {"Stream": 1, "Gemm": 1}
    assert told["torch"]["layers.last"] == 1


def test_nan_spreads_as_layer_by_layer():
    found = built("resnet")
    found.samples[0][1, 3, 2, 2] = float("nan")
    [answer, _] = answers(found.model, found.samples)
    assert answer[1].isnan().all()
    assert not answer[0].isnan().any()


def test_a_kernel_that_does_not_fit_leaves_the_program_to_the_layers(monkeypatch):
    found = built("modulated")
    expected = answers(found.model, found.samples)
    fused = runtime.fused_forward(found.model)

    def refuse(*_) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    [program] = fused.programs.store.programs.values()
    monkeypatch.setattr(program, "run", refuse)
    with pytest.warns(UserWarning, match="layer by layer: its Triton kernel failed"):
        again = answers(found.model, found.samples)
    assert max(map(distance, again, expected)) < EXACT


def test_changed_weights_and_ranges_are_seen():
    found = built("geglu").check()
    with torch.no_grad():
        find_clock(found.model).scale = find_clock(found.model).scale * 1.5
    found.check()
    with torch.no_grad():
        found.model.layers["narrow"].weight.add_(1)
    found.check()


class Replay:
    """A recording that runs its steps again: a CUDA graph on a machine without a card."""

    def __init__(self, run: Callable[[], None]):
        self.run = run
        self.count = 0

    def replay(self) -> None:
        self.count += 1
        self.run()


def two_steps(kind: str) -> OnCard:
    """A network with other ranges at its second timestep."""
    found = built(kind)
    clock = find_clock(found.model)
    clock.known = {500: 0, 100: 1}
    clock.timesteps = torch.tensor([500, 100], dtype=torch.int32, device=DEVICE)
    clock.widen()
    clock.scale[:, 1] *= 1.3
    for quantizer in quantizers(found.model).values():
        quantizer.per_step = True
    return found


@torch.no_grad()
def at_both(model: nn.Module, sample: Tensor) -> list[Tensor]:
    return [model(sample, torch.tensor(timestep)) for timestep in (500, 100)]


def test_a_recorded_program_reads_the_step_of_each_replay():
    found = two_steps("modulated")
    sample = found.samples[0]
    with runtime.plain(found.model):
        expected = at_both(found.model, sample)
    assert distance(*expected) > 1e-3
    recordings: list[Replay] = []

    def record(run: Callable[[], None]) -> Replay:
        recordings.append(Replay(run))
        return recordings[-1]

    runtime.capture(found.model, record)
    for _ in range(2):
        answers = at_both(found.model, sample)
        assert max(map(distance, answers, expected)) < EXACT
    [recording] = recordings
    assert recording.count == 4
    with pytest.raises(BadInput, match="found timestep 300"):
        found.model(sample, torch.tensor(300))
    at_both(found.model, sample[:1])
    assert len(recordings) == 2


def test_what_cannot_be_captured_says_so(monkeypatch):
    found = built("modulated")
    runtime.capture(found.model)
    if DEVICE.type == "cpu":
        with pytest.raises(BadInput, match="found no CUDA card"):
            answers(found.model, found.samples)
    runtime.unfuse(found.model)
    with pytest.raises(BadInput, match="not fused"):
        runtime.capture(found.model)


def test_a_step_that_the_device_looks_up_needs_no_wait():
    """In a recorded call the index and the doubt are tensors, which the program reads."""
    found = two_steps("modulated")
    expected = at_both(found.model, found.samples[0])
    fused = runtime.fused_forward(found.model)
    clock = find_clock(found.model)
    for timestep, answer in zip((500, 100), expected, strict=True):
        clock._set_on_device(torch.tensor(timestep, device=DEVICE), 0.5)
        assert clock.doubt is not None
        with torch.no_grad():
            again = fused(found.samples[0], torch.tensor(timestep))
        assert torch.equal(again, answer)


def test_compiled_layers_call_the_kernels_and_read_each_step():
    """torch.compile gets a graph of one operator for each layer, and compiles it once."""
    torch.compiler.reset()
    found = two_steps("resnet")
    sample = found.samples[0]
    with runtime.plain(found.model):
        expected = at_both(found.model, sample)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(found.model, fullgraph=True, backend=backend)
        answers = at_both(compiled, sample)
    assert max(map(distance, answers, expected)) < ONE_ROUNDING_APART
    operators = [name for name in seen if name.startswith("lowtide.")]
    assert len(operators) == len(found.model.layers)
    assert all("triton" in name for name in operators)
    with runtime.plain(found.model):
        assert all(map(torch.equal, at_both(found.model, sample), expected))
    with torch.no_grad():
        assert compiled(sample, torch.tensor(300)).isnan().all()
