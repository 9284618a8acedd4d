"""The work of a network: its multiply-adds are those that torch counts."""

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lowtide.costs import Network, Work
from lowtide.models import ARCHITECTURES, adapt


@pytest.mark.parametrize("name", ["unet2d", "unet-text", "dit", "flux"])
def test_multiply_adds_are_those_that_torch_counts(name: str) -> None:
    model = tiny.model(name)
    network = Network(adapt(model))
    # The counter knows attention as matrix products only.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**ARCHITECTURES[type(model)].example(model, 2))
    whole = network.whole.forward
    products = whole.conv + whole.product
    assert 2 * 2 * products == pytest.approx(counter.get_total_flops(), rel=1e-6)
    units = sum((part.forward for part in network.by_unit.values()), Work())
    temporal: set[str] = set()
    for unit in network.temporal:
        temporal.update(unit.layers)
    temporal_products = sum(
        network.node_work(node).product for node in network.graph.nodes if node.target in temporal
    )
    assert units.conv + units.product + temporal_products == pytest.approx(products, rel=1e-9)
