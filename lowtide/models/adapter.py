"""Adapter and Unit: what must be known of an architecture, most of it found by recording one forward pass."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.models.trace import Graph, Node, Param, flat_inputs, leaves_of, on_meta, record

# What a temporal feature passes on its way to being cut: an axis added, a table of its own added.
PASSED_ON = (
    Tensor.__getitem__,
    Tensor.reshape,
    Tensor.view,
    Tensor.unsqueeze,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.add,
)
JOINS = (torch.cat, torch.concat)
Example = Callable[[nn.Module, int], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """What recording cannot tell: which classes are blocks, what inputs look like (and which have no
    batch axis), how timesteps become integers."""

    blocks: tuple[str, ...]
    example: Example
    ticks: int = 1
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """Anything that can be replayed alone. `features`, of a temporal unit: the layers whose output the rest reads."""

    name: str
    kind: str
    layers: tuple[str, ...]
    reads: tuple[str, ...]
    features: tuple[str, ...] = ()


class Adapter:
    """An architecture seen through one model of it; every answer is by name and in forward order."""

    def __init__(self, model: nn.Module, architecture: Architecture):
        self.architecture = architecture
        self.ticks = architecture.ticks
        self.meta = on_meta(model).eval()
        self.parameters = tuple(signature(model.forward).parameters)
        self._layer_graph = self.layer_graph(2)

    @cached_property
    def all_layers(self) -> dict[str, nn.Module]:
        return {
            name: module
            for name, module in self.meta.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }

    def graph(self, batch: int, leaves: dict[str, nn.Module]) -> Graph:
        return record(self.meta, self.architecture.example(self.meta, batch), leaves)

    @cached_property
    def reads(self) -> dict[str, frozenset[str]]:
        """For each layer in forward order: the model inputs that its own input depends on."""
        found: dict[str, frozenset[str]] = {}
        for node in self._layer_graph.nodes:
            if node.is_leaf:
                dye = frozenset().union(*(self._layer_graph.values[id].dye for id in node.uses()))
                found[node.target] = found.get(node.target, frozenset()) | dye
        return found

    def layers(self) -> dict[str, nn.Module]:
        """Every Linear and Conv2d that a forward pass calls, in that order."""
        return {name: self.all_layers[name] for name in self.reads}

    def uncalled(self) -> list[str]:
        return [name for name in self.all_layers if name not in self.reads]

    @cached_property
    def content(self) -> frozenset[str]:
        """The sample, and inputs of three or more axes, like a text. The rest are conditions, like the timestep."""
        values, inputs = self._layer_graph.values, self._layer_graph.inputs
        return frozenset(
            name
            for name, id in inputs.items()
            if name == self.parameters[0] or len(values[id].shape) > 2
        )

    @cached_property
    def feeds(self) -> dict[str, frozenset[str]]:
        """For each layer: the layers whose output reaches it with none in between."""
        found: dict[str, frozenset[str]] = {}
        for node in self._layer_graph.nodes:
            if node.is_leaf:
                near = frozenset().union(*(self._layer_graph.values[id].near for id in node.uses()))
                found[node.target] = found.get(node.target, frozenset()) | near
        return found

    @cached_property
    def temporal_layers(self) -> frozenset[str]:
        """Layers that know the timestep and nothing of the picture, and the layers that only serve those."""
        found = {
            name for name, dye in self.reads.items() if "timestep" in dye and not dye & self.content
        }
        waiting = list(found)
        while waiting:
            new = self.feeds[waiting.pop()] - found
            found |= new
            waiting += new
        return frozenset(found)

    @cached_property
    def _temporal(self) -> tuple[Unit, ...]:
        groups: list[set[str]] = []
        for name in (name for name in self.reads if name in self.temporal_layers):
            joined = {name} | (self.feeds[name] & self.temporal_layers)
            touching = [group for group in groups if group & joined]
            groups = [group for group in groups if not group & joined] + [joined.union(*touching)]
        order = list(self.reads)
        units = [self.temporal_unit(sorted(group, key=order.index)) for group in groups]
        return tuple(sorted(units, key=lambda unit: order.index(unit.layers[0])))

    def temporal_unit(self, layers: list[str]) -> Unit:
        reads = frozenset().union(*(self.reads[name] for name in layers))
        return Unit(
            f"temporal:{layers[0]}",
            "temporal",
            tuple(layers),
            tuple(sorted(reads)),
            self.features(layers),
        )

    def features(self, layers: list[str]) -> tuple[str, ...]:
        """Those of the layers whose output meets the picture with no other layer in between."""
        values, met = self._layer_graph.values, set()
        for node in self._layer_graph.nodes:
            used = [values[id] for id in node.uses()]
            if any(value.dye & self.content for value in used):
                met |= {
                    name for value in used if not value.dye & self.content for name in value.near
                }
        return tuple(name for name in layers if name in met)

    def chunks(self, layer: str) -> int:
        """Into how many parts of alike meaning the rest of the network cuts this temporal layer's answer (scale and shift: 2)."""
        followed = {
            id for node in self._layer_graph.nodes if node.target == layer for id in node.gives()
        }
        for node in self._layer_graph.nodes:
            if not node.is_leaf and followed.intersection(node.uses()):
                if node.target in (torch.chunk, Tensor.chunk):
                    return node.args[1]
                followed.update(node.gives() if node.target in PASSED_ON else ())
        return 1

    def norm_before(self, layer: str) -> str | None:
        """The group norm whose answer this layer reads as it is, and nobody else does."""
        nodes, values = (
            self._layer_graph.nodes,
            {id: node for node in self._layer_graph.nodes for id in node.gives()},
        )
        (reads,) = [node.uses() for node in nodes if node.target == layer][:1]
        source = values.get(reads[0])
        listeners = sum(reads[0] in node.uses() for node in nodes)
        if source is None or source.target is not torch.nn.functional.group_norm or listeners != 1:
            return None
        return next(
            (
                arg.name.rpartition(".")[0]
                for arg in leaves_of((source.args, source.kwargs))
                if isinstance(arg, Param)
            ),
            None,
        )

    def temporal(self) -> list[Unit]:
        """The temporal information block: one unit, or several where each block has an embedder of its own."""
        return list(self._temporal)

    @cached_property
    def block_names(self) -> list[str]:
        found: list[str] = []
        for name, module in self.meta.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in found)
            if type(module).__name__ in self.architecture.blocks and not inside:
                found.append(name)
        return found

    @cached_property
    def _units(self) -> tuple[Unit, ...]:
        plain = self.homes(name for name in self.reads if name not in self.temporal_layers)
        order = list(self.reads)
        return tuple(
            sorted([*self._temporal, *plain], key=lambda unit: order.index(unit.layers[0]))
        )

    def homes(self, layers: Iterable[str]) -> list[Unit]:
        """These layers by the block they lie in; one outside of blocks is a unit of its own."""
        grouped: dict[str, list[str]] = {}
        for name in layers:
            home = next((block for block in self.block_names if name.startswith(f"{block}.")), name)
            grouped.setdefault(home, []).append(name)
        return [self.plain_unit(name, layers) for name, layers in grouped.items()]

    def plain_unit(self, name: str, layers: list[str]) -> Unit:
        reads = frozenset().union(*(self.reads[layer] for layer in layers))
        return Unit(
            name, "layer" if layers == [name] else "block", tuple(layers), tuple(sorted(reads))
        )

    def units(self) -> list[Unit]:
        """A partition of the layers, in forward order."""
        return list(self._units)

    def blocks(self) -> list[Unit]:
        return [unit for unit in self._units if unit.kind == "block"]

    def ends(self) -> tuple[str, str]:
        """The first layer that reads the sample, and the last layer of all."""
        sample = self.parameters[0]
        return next(name for name, dye in self.reads.items() if sample in dye), list(self.reads)[-1]

    def shortcuts(self) -> list[str]:
        return [name for name in self.reads if "conv_shortcut" in name.split(".")]

    def concatenations(self) -> dict[str, int]:
        """Layers that read two tensors laid side by side along their input channels: how many come from the first."""
        nodes, found = {id: node for node in self._layer_graph.nodes for id in node.gives()}, {}
        for node in self._layer_graph.nodes:
            if node.is_leaf and (
                width := self.first_width(self.all_layers[node.target], nodes.get(node.uses()[0]))
            ):
                found[node.target] = width
        return found

    def first_width(self, layer: nn.Module, source: Node | None) -> int | None:
        """Channels of the first of two tensors that `source` joined for this layer."""
        if source is None or source.target not in JOINS or len(source.uses()) != 2:
            return None
        given = dict(zip(("tensors", "dim"), source.args, strict=False)) | source.kwargs
        shape = self._layer_graph.values[source.uses()[0]].shape
        axis = 1 if isinstance(layer, nn.Conv2d) else len(shape) - 1
        return shape[axis] if given.get("dim", 0) % len(shape) == axis else None

    def downsamplers(self) -> list[str]:
        return [name for name in self.reads if ".downsamplers." in name]

    def attentions(self) -> list[str]:
        """Modules that hand their work to a diffusers attention processor."""
        return [
            name
            for name, module in self.meta.named_modules()
            if callable(getattr(module, "set_processor", None))
        ]

    @lru_cache(maxsize=4)  # noqa: B019 - DiT asks once for each of its temporal units
    def layer_graph(self, batch: int) -> Graph:
        """The whole forward pass with each layer as one node."""
        return self.graph(batch, self.all_layers)

    @lru_cache(maxsize=4)  # noqa: B019 - an adapter lives as long as its job
    def block_graph(self, batch: int) -> Graph:
        """The whole forward pass with each block, and each layer outside of blocks, as one node."""
        leaves = {name: self.meta.get_submodule(name) for name in self.block_names}
        outside = [
            name for name in self.reads if not any(name.startswith(f"{block}.") for block in leaves)
        ]
        return self.graph(batch, leaves | {name: self.all_layers[name] for name in outside})

    def temporal_graph(self, unit: Unit, batch: int) -> Graph:
        """From the unit's inputs to its features alone, `batch` timesteps at once."""
        graph = self.layer_graph(batch)
        given = {node.target: node.gives()[0] for node in graph.nodes if node.is_leaf}
        return graph.part([given[name] for name in unit.features])

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return dict(zip(self.parameters, args, strict=False)) | kwargs


def check_example(model: nn.Module, example: dict[str, Any]) -> None:
    """An example must name the timestep, and hold tensors only."""
    if "timestep" not in example or not all(
        isinstance(value, Tensor) for value in flat_inputs(example).values()
    ):
        raise BadInput(
            f"found {type(model).__name__} with inputs {', '.join(example)}", "a denoiser called (sample, timestep, ...)",
            "write an Architecture with the classes of its blocks and an example input, see docs/architecture.md",
        )  # fmt: skip
