"""Speed: seconds of this machine for a multiply-add, a value, a weight and a call, by short probes.

The probes run what a recipe spends its time on, with the layer shapes that have most of the
model's multiply-adds. All probes together take about a second.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.costs.work import Network, Work, layer_weight
from lowtide.formats import SEARCHES, Affine
from lowtide.machine.bf16 import bf16_products
from lowtide.machine.devices import CPU, synchronize
from lowtide.models.trace import Node
from lowtide.nn.rounding import AdaRound, RoundingOptimizer

PROBE_SECONDS = 0.05
PROBE_PRODUCTS = 1e8
PROBE_VALUES = 1 << 18
PROBE_WEIGHTS = 1 << 16
SHAPES = 3  # layer shapes that are probed, for convolutions and for linear layers
# Measured on six networks of 0.1 to 20 million weights. Layers whose shape is not probed are
# slower, and Python takes time between calls.
OFF_WIDTH = 1.2
BETWEEN = 2.5
Clock = Callable[[], float]


@dataclass(frozen=True)
class Products:
    """Seconds of one multiply-add in convolutions and in other products.

    `..._back`: the seconds that the backward pass adds.
    """

    conv: float
    conv_back: float
    linear: float
    linear_back: float

    def forward(self, work: Work) -> float:
        """Seconds of the multiply-adds in a forward pass."""
        return self.conv * work.conv + self.linear * work.product

    def backward(self, work: Work) -> float:
        """Seconds of the multiply-adds that a backward pass adds."""
        return self.conv_back * work.conv + self.linear_back * work.product


@dataclass(frozen=True)
class Speed:
    """Seconds of one unit of each kind of work.

    full: multiply-adds in float32.
    low: multiply-adds while rounding is learnt, in bf16 where that is faster.
    value, call: one value written, one call.
    value_back, call_back: what the backward pass adds to them.
    weight: one weight in one iteration of learning its rounding.
    search: one weight in the search for a range.
    """

    full: Products
    low: Products
    value: float
    value_back: float
    weight: float
    search: float
    call: float
    call_back: float

    def forward(self, work: Work, products: Products | None = None) -> float:
        """Seconds of a pass without gradients."""
        seconds = (products or self.full).forward(work)
        return OFF_WIDTH * (seconds + self.value * work.values) + BETWEEN * self.call * work.calls

    def backward(self, work: Work, products: Products | None = None) -> float:
        """Seconds that gradients add."""
        seconds = (products or self.full).backward(work)
        return seconds + self.value_back * work.values + self.call_back * work.calls

    def learning(self, work: Work) -> float:
        """Seconds of one iteration of learning a rounding: forward, backward, the weights' step."""
        passes = self.forward(work, self.low) + self.backward(work, self.low)
        return passes + self.weight * work.weights

    def rates(self) -> dict[str, float]:
        """Billions of units a second, by kind of work, for a reader."""
        seconds = asdict(self)
        flat: dict[str, float] = {}
        for kind in ("full", "low"):
            products = seconds.pop(kind)
            flat |= {f"{kind} {name}": each for name, each in products.items()}
        return {name: round(1e-9 / each, 3) for name, each in (flat | seconds).items()}


def measured(
    network: Network, clock: Clock = time.perf_counter, device: torch.device = CPU
) -> Speed:
    """The speed of this machine, by probes."""
    full = _products_probe(network, clock)
    low = full
    with bf16_products(device):
        if torch.is_autocast_enabled(device.type):
            low = _products_probe(network, clock)
    value, value_back = _value_probe(clock)
    call, call_back = _call_probe(clock)
    return Speed(
        full=full,
        low=low,
        value=value,
        value_back=value_back,
        weight=_weight_probe(clock),
        search=_search_probe(clock),
        call=call,
        call_back=call_back,
    )


def measured_on(network: Network, device: torch.device, clock: Clock) -> Speed:
    """The speed of an accelerator, by the same probes there."""

    def synchronized() -> float:
        synchronize(device)
        return clock()

    with torch.device(device):
        return measured(network, synchronized, device)


def _products_probe(network: Network, clock: Clock) -> Products:
    """A network without one kind of layer gets the other kind's speed for it."""
    conv, conv_back = _layer_probe(network, nn.Conv2d, clock)
    linear, linear_back = _layer_probe(network, nn.Linear, clock)
    return Products(
        conv=conv or linear,
        conv_back=conv_back or linear_back,
        linear=linear or conv,
        linear_back=linear_back or conv_back,
    )


def _timed(act: Callable[[], object], clock: Clock) -> float:
    """Mean seconds of one call of `act`, over as many calls as fit in a probe's time."""
    act()
    turns = 0
    started = clock()
    while (seconds := clock() - started) < PROBE_SECONDS or turns < 3:
        act()
        turns += 1
    return seconds / turns


def _forward_and_backward(act: Callable[[], Tensor], clock: Clock) -> tuple[float, float]:
    """Seconds of a forward pass, and seconds that a backward pass adds."""
    with torch.no_grad():
        forward = _timed(act, clock)
    both = _timed(lambda: act().sum().backward(), clock)
    return forward, max(forward / 4, both - forward)


def _layer_probe(network: Network, kind: type[nn.Module], clock: Clock) -> tuple[float, float]:
    """Seconds of a multiply-add, forward and backward; 0 without layers of this kind.

    They are a mean over the shapes that have most of the multiply-adds, weighted by these.
    """
    totals: dict[_ProbeShape, float] = {}
    for node in network.graph.nodes:
        if node.is_leaf and isinstance(network.layer(node), kind):
            shape = _probe_shape(network, node)
            work = network.node_work(node)
            totals[shape] = totals.get(shape, 0) + work.conv + work.product
    largest = sorted(totals, key=lambda shape: totals[shape], reverse=True)[:SHAPES]
    whole = sum(totals[shape] for shape in largest)
    forward = 0.0
    backward = 0.0
    for shape in largest:
        act, products = _probe_of(shape)
        seconds, seconds_back = _forward_and_backward(act, clock)
        forward += seconds / products * totals[shape] / whole
        backward += seconds_back / products * totals[shape] / whole
    return forward, backward


class _ConvOptions(NamedTuple):
    """The options of a convolution, in the order of torch's function."""

    stride: tuple[int, ...]
    padding: Any  # numbers or a word; torch's function has an overload for each
    dilation: tuple[int, ...]
    groups: int


class _ProbeShape(NamedTuple):
    """The shapes of a layer's input and weight, and the options if it is a convolution."""

    read: tuple[int, ...]
    weight: tuple[int, ...]
    conv: _ConvOptions | None = None


def _probe_shape(network: Network, node: Node) -> _ProbeShape:
    layer = network.layer(node)
    read = network.shape(node.uses()[0])
    weight = tuple(layer_weight(layer).shape)
    if isinstance(layer, nn.Conv2d):
        options = _ConvOptions(layer.stride, layer.padding, layer.dilation, layer.groups)
        return _ProbeShape(read[1:], weight, options)
    return _ProbeShape((math.prod(read[:-1]), read[-1]), weight)


def _probe_of(shape: _ProbeShape) -> tuple[Callable[[], Tensor], float]:
    """The layer on random values, and its multiply-adds; the input is cut to a probe's size."""
    read, weight, options = shape
    w = torch.randn(weight, requires_grad=True)
    if options is None:
        rows = max(1, min(read[0], round(PROBE_PRODUCTS / math.prod(weight))))
        x = torch.randn(rows, read[1], requires_grad=True)
        return lambda: F.linear(x, w), rows * math.prod(weight)
    side = math.isqrt(max(1, int(PROBE_PRODUCTS / math.prod(weight))))
    height, width = (max(weight[2], min(each, side)) for each in read[1:])
    positions = height * width / math.prod(options.stride)
    samples = max(1, round(PROBE_PRODUCTS / (math.prod(weight) * positions)))
    x = torch.randn(samples, read[0], height, width, requires_grad=True)
    return lambda: F.conv2d(x, w, None, *options), samples * positions * math.prod(weight)


def _value_probe(clock: Clock) -> tuple[float, float]:
    """A norm, an activation and a sum, as blocks have them; each writes its values once."""
    x = torch.randn(8, 64, PROBE_VALUES // 512, requires_grad=True)
    forward, back = _forward_and_backward(lambda: F.silu(F.group_norm(x, 8)) + x, clock)
    return forward / (3 * x.numel()), back / (3 * x.numel())


def _call_probe(clock: Clock) -> tuple[float, float]:
    """The layers of a block on very few values, so that only the calls take time."""
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Conv2d(4, 4, 3, 1, 1), nn.GroupNorm(2, 4), nn.SiLU()]
    chain = nn.Sequential(*layers)
    x = torch.randn(1, 4, 4, 4, requires_grad=True)
    forward, back = _forward_and_backward(lambda: chain(x), clock)
    return forward / len(chain), back / len(chain)


def _weight_probe(clock: Clock) -> float:
    """One step of learning the rounding of a weight: the penalty, Adam, the new value."""
    rounding = AdaRound(15 * torch.rand(64, PROBE_WEIGHTS // 64), lambda codes: 0.1 * (codes - 7))
    roundings = RoundingOptimizer([rounding], 1e-3)
    gradient = torch.randn_like(rounding.values())

    def act() -> None:
        rounding.values().grad = gradient
        roundings.step(0.01, 10.0)

    return _timed(act, clock) / PROBE_WEIGHTS


def _search_probe(clock: Clock) -> float:
    """The search for a range, per weight."""
    rows = torch.randn(32, 256)
    form = Affine(4, signed=False, axis=0)
    return _timed(lambda: SEARCHES["mse"](rows, form), clock) / rows.numel()
