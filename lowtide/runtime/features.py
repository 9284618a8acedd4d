"""Temporal features: what a feature cache holds, decoded once."""

import torch

from lowtide.models.trace import Node
from lowtide.nn.feature_cache import Cached
from lowtide.runtime.lowering import Lowering
from lowtide.runtime.memory import View, new_view
from lowtide.runtime.steps import FeaturesStep


def cached_features(lowering: Lowering, node: Node) -> View | None:
    """The features of the running step (B, width); torch runs a cache that computes some steps."""
    assert isinstance(node.target, str)
    module = lowering.root.get_submodule(node.target)
    shape = lowering.result_shape(node)
    assert isinstance(module, Cached)
    if module.plan.computed or not module.quantized or len(shape) != 2:
        return None
    steps = torch.arange(module.clock.steps, device=lowering.target.device)
    table = module.cached(steps).float().contiguous()
    kind = lowering.result_type(node)
    output = new_view(torch.empty(shape, dtype=kind, device="meta"))
    lowering.draft.steps.append(FeaturesStep(table, lowering.numbers.step, output))
    return output
