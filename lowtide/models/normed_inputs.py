"""Which layers read a norm, directly or through SiLU: the mean of their input is known roughly."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lowtide.models.adapter import Adapter
from lowtide.models.trace import Node, Param, leaves_of

NORMS = (F.group_norm, F.layer_norm)
# Calls that keep the values of each channel.
PASSED_ON = (F.dropout, Tensor.transpose, Tensor.view, Tensor.reshape, Tensor.permute, Tensor.to)


@dataclass(frozen=True)
class NormedInput:
    """The norm before a layer, by name, and whether SiLU lies between them."""

    norm: str
    activated: bool


def normed_inputs(adapter: Adapter) -> dict[str, NormedInput]:
    """The layers that read nothing but a norm with a weight and a bias."""
    graph = adapter.layer_graph(2)
    # Dropout gives its own argument back.
    sources: dict[int, Node] = {}
    for node in graph.nodes:
        sources |= {number: node for number in node.gives() if number not in node.uses()}
    found: dict[str, NormedInput] = {}
    for name, node in graph.leaf_nodes():
        source = sources.get(node.uses()[0])
        activated = False
        while source is not None and (source.target is F.silu or source.target in PASSED_ON):
            activated |= source.target is F.silu
            source = sources.get(source.uses()[0])
        if source is not None and source.target in NORMS:
            leaves = leaves_of((source.args, source.kwargs))
            names = [leaf.name for leaf in leaves if isinstance(leaf, Param)]
            if len(names) > 1:
                found[name] = NormedInput(names[0].rpartition(".")[0], activated)
    return found
