"""Speed: what this machine takes for a multiply-add, a value, a learnt weight, a call; measured in about a second.

The probes run the very things a recipe spends its time on, at the widths where the model spends most of its multiply-adds.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.costs.work import Network, Work
from lowtide.formats import SEARCHES, Affine
from lowtide.machine.bf16 import bf16_products
from lowtide.models.trace import Node
from lowtide.nn.rounding import AdaRound, Roundings

PROBE_SECONDS, PROBE_PRODUCTS, PROBE_VALUES, PROBE_WEIGHTS, SHAPES = 0.05, 1e8, 1 << 18, 1 << 16, 3
# Found on six networks of 0.1 to 20 million weights: layers off the typical width are slower, and Python runs between calls.
OFF_WIDTH, BETWEEN = 1.2, 2.5
Clock = Callable[[], float]


@dataclass(frozen=True)
class Products:
    """Seconds of a multiply-add in convolutions and in the rest, forward, and what the backward pass adds."""

    conv: float
    conv_back: float
    linear: float
    linear_back: float

    def forward(self, work: Work) -> float:
        return self.conv * work.conv + self.linear * work.product

    def backward(self, work: Work) -> float:
        return self.conv_back * work.conv + self.linear_back * work.product


@dataclass(frozen=True)
class Speed:
    """Seconds for one of each, forward and backward; `low`: products while rounding is learnt; `weight`: one iteration of
    learning its rounding; `search`: its range.
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
        """Seconds of one iteration of learning a rounding: there, back, and the weights' own part."""
        return (
            self.forward(work, self.low)
            + self.backward(work, self.low)
            + self.weight * work.weights
        )

    def rates(self) -> dict[str, float]:
        """For a reader: billions a second of the things that are many."""
        found = asdict(self)
        flat = {
            f"{kind} {name}": each
            for kind in ("full", "low")
            for name, each in found.pop(kind).items()
        } | found
        return {name: round(1e-9 / seconds, 3) for name, seconds in flat.items()}


def measured(network: Network, clock: Clock = time.perf_counter) -> Speed:
    """Probe this machine."""
    full = products_probe(network, clock)
    with bf16_products(torch.device("cpu")):
        less = products_probe(network, clock) if torch.is_autocast_enabled("cpu") else full
    value, value_back = value_probe(clock)
    call, call_back = call_probe(clock)
    return Speed(
        full, less, value, value_back, weight_probe(clock), search_probe(clock), call, call_back
    )


def products_probe(network: Network, clock: Clock) -> Products:
    """A network without one kind of layers takes the other's speed for it."""
    conv, conv_back = layer_probe(network, nn.Conv2d, clock)
    product, product_back = layer_probe(network, nn.Linear, clock)
    return Products(
        conv or product, conv_back or product_back, product or conv, product_back or conv_back
    )


def timed(act: Callable[[], object], clock: Clock) -> float:
    """Seconds of one turn, over as many as fit in a probe's time: with what others on the machine take from it."""
    act()
    turns, started = 0, clock()
    while (seconds := clock() - started) < PROBE_SECONDS or turns < 3:
        act()
        turns += 1
    return seconds / turns


def there_and_back(act: Callable[[], Tensor], clock: Clock) -> tuple[float, float]:
    """Seconds of a forward pass, and what a backward pass adds."""
    with torch.no_grad():
        forward = timed(act, clock)
    return forward, max(forward / 4, timed(lambda: act().sum().backward(), clock) - forward)


def layer_probe(network: Network, kind: type[nn.Module], clock: Clock) -> tuple[float, float]:
    """Seconds of a multiply-add, forward and backward, over the shapes that have most of them; 0 without such layers."""
    totals: dict[tuple, float] = {}
    for node in network.graph.nodes:
        if node.is_leaf and isinstance(network.adapter.all_layers[node.target], kind):
            shape = probe_shape(network, node)
            work = network.node_work(node)
            totals[shape] = totals.get(shape, 0) + work.conv + work.product
    largest = sorted(totals, key=totals.get, reverse=True)[:SHAPES]
    whole, seconds = sum(totals[shape] for shape in largest), [0.0, 0.0]
    for shape in largest:
        act, products = probe_of(shape, kind)
        for place, each in enumerate(there_and_back(act, clock)):
            seconds[place] += each / products * totals[shape] / whole
    return seconds[0], seconds[1]


def probe_shape(network: Network, node: Node) -> tuple:
    """What the layer reads, its weight, and how a convolution goes about it."""
    layer = network.adapter.all_layers[node.target]
    given, weight = network.shape(node.uses()[0]), tuple(layer.weight.shape)
    if isinstance(layer, nn.Linear):
        return (math.prod(given[:-1]), given[-1]), weight, ()
    return given[1:], weight, (layer.stride, layer.padding, layer.dilation, layer.groups)


def probe_of(shape: tuple, kind: type[nn.Module]) -> tuple[Callable[[], Tensor], float]:
    """The layer on random values, cut to a size that a probe can run often; and its multiply-adds."""
    given, weight, options = shape
    w = torch.randn(weight, requires_grad=True)
    if kind is nn.Linear:
        rows = max(1, min(int(given[0]), round(PROBE_PRODUCTS / math.prod(weight))))
        x = torch.randn(rows, given[1], requires_grad=True)
        return lambda: F.linear(x, w), rows * math.prod(weight)
    side = math.isqrt(max(1, int(PROBE_PRODUCTS / math.prod(weight))))
    height, width = (max(weight[2], min(each, side)) for each in given[1:])
    places = height * width / math.prod(options[0])
    samples = max(1, round(PROBE_PRODUCTS / (math.prod(weight) * places)))
    x = torch.randn(samples, given[0], height, width, requires_grad=True)
    return lambda: F.conv2d(x, w, None, *options), samples * places * math.prod(weight)


def value_probe(clock: Clock) -> tuple[float, float]:
    """A norm, an activation and a sum, as blocks have them; each writes its values once."""
    x = torch.randn(8, 64, PROBE_VALUES // 512, requires_grad=True)
    forward, back = there_and_back(lambda: F.silu(F.group_norm(x, 8)) + x, clock)
    return forward / (3 * x.numel()), back / (3 * x.numel())


def call_probe(clock: Clock) -> tuple[float, float]:
    """What blocks are made of, on next to nothing: only the calls are left."""
    chain = nn.Sequential(
        *[
            part
            for _ in range(8)
            for part in (nn.Conv2d(4, 4, 3, 1, 1), nn.GroupNorm(2, 4), nn.SiLU())
        ]
    )
    x = torch.randn(1, 4, 4, 4, requires_grad=True)
    forward, back = there_and_back(lambda: chain(x), clock)
    return forward / len(chain), back / len(chain)


def weight_probe(clock: Clock) -> float:
    """Learning the rounding of one weight, once its gradient is there: the penalty, Adam, the new value."""
    rounding = AdaRound(15 * torch.rand(64, PROBE_WEIGHTS // 64), lambda codes: 0.1 * (codes - 7))
    roundings = Roundings([rounding], 1e-3)
    gradient = torch.randn_like(rounding.values())

    def act() -> None:
        rounding.values().grad = gradient
        roundings.step(0.01, 10.0)

    return timed(act, clock) / PROBE_WEIGHTS


def search_probe(clock: Clock) -> float:
    """The search for one weight's share of a range."""
    rows = torch.randn(32, 256)
    return timed(lambda: SEARCHES["mse"](rows, Affine(4, False, 0)), clock) / rows.numel()
