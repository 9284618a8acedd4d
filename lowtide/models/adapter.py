"""Adapter and Unit: what must be known of an architecture, mostly from one recorded pass."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.models.trace import Graph, Node, Param, Value, leaves_of, on_meta, record

# Calls that a temporal feature passes before it is chunked: an axis added, a table added.
PASSED_ON = (
    Tensor.__getitem__,
    Tensor.reshape,
    Tensor.view,
    Tensor.unsqueeze,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.add,
)
CHUNKS = (torch.chunk, Tensor.chunk)
JOINS = (torch.cat, torch.concat)
# One call's arguments by name: tensors, dicts of tensors, flags. Each name's kind differs between
# models, and no model declares it.
Arguments = dict[str, Any]
Example = Callable[[nn.Module, int], Arguments]


class Answer(Protocol):
    """What a denoiser returns: a tensor, or a tuple or an output of diffusers with it in front."""

    def __getitem__(self, index: int, /) -> Tensor: ...


def answer_of(result: Answer) -> Tensor:
    """The tensor in what a denoiser returns."""
    return result if isinstance(result, Tensor) else result[0]


@dataclass(frozen=True)
class Architecture:
    """What a recording cannot tell about a class of models.

    blocks: the class names of its blocks.
    example: makes the inputs of one call, by name, for a model and a batch size.
    ticks: the factor that turns the timestep that the model reads into an integer.
    shared: the inputs that have no batch axis.
    repeated: the inputs that have several rows of their first axis for each sample, and how many.
    recorded: it was found by recording calls of a pipeline; None where it is written down.
    """

    blocks: tuple[str, ...]
    example: Example
    ticks: int = 1
    shared: tuple[str, ...] = ()
    repeated: Mapping[str, int] = field(default_factory=dict)
    recorded: Arguments | None = None

    def rows(self, name: str, tensor: Tensor, samples: int) -> int:
        """How many rows of its first axis an input has for each sample; 0 without a batch axis."""
        if name in self.shared or not tensor.dim():
            return 0
        rows = self.repeated.get(name, 1)
        return rows if len(tensor) == rows * samples else 0


@dataclass(frozen=True)
class Unit:
    """A part of the model that can be replayed alone.

    `reads`: the model inputs that the unit depends on. `features`, of a temporal unit: the layers
    whose output the rest of the network reads.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    reads: tuple[str, ...]
    features: tuple[str, ...] = ()


class Adapter:
    """What an architecture says about one model; every answer is by name and in forward order."""

    def __init__(self, model: nn.Module, architecture: Architecture):
        self.architecture = architecture
        self.ticks = architecture.ticks
        self.meta = on_meta(model).eval()
        self.parameters = tuple(signature(model.forward).parameters)
        self._layer_graph = self.layer_graph(2)

    @cached_property
    def all_layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
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
        return self._over_input(lambda value: value.inputs)

    @cached_property
    def _feeds(self) -> dict[str, frozenset[str]]:
        """For each layer: the layers whose output reaches it with no other layer in between."""
        return self._over_input(lambda value: value.last_leaves)

    def _over_input(self, names: Callable[[Value], frozenset[str]]) -> dict[str, frozenset[str]]:
        """For each layer in forward order: the union of these names over the values it reads."""
        union: dict[str, frozenset[str]] = {}
        for name, node in self._layer_graph.leaf_nodes():
            used = self._layer_graph.used_values(node)
            union[name] = union.get(name, frozenset()).union(*map(names, used))
        return union

    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Every Linear and Conv2d that a forward pass calls, in that order."""
        return {name: self.all_layers[name] for name in self.reads}

    def uncalled(self) -> list[str]:
        return [name for name in self.all_layers if name not in self.reads]

    @cached_property
    def _content(self) -> frozenset[str]:
        """The sample, and inputs of three or more axes such as a text.

        All other inputs are conditions, such as the timestep.
        """
        values = self._layer_graph.values
        return frozenset(
            name
            for name, id in self._layer_graph.inputs.items()
            if name == self.parameters[0] or len(values[id].shape) > 2
        )

    @cached_property
    def _temporal_layers(self) -> frozenset[str]:
        """Layers that depend on the timestep and not on the content.

        Layers whose output only these layers read are temporal too.
        """
        temporal = {
            name
            for name, inputs in self.reads.items()
            if "timestep" in inputs and not inputs & self._content
        }
        waiting = list(temporal)
        while waiting:
            new = self._feeds[waiting.pop()] - temporal
            temporal |= new
            waiting += new
        return frozenset(temporal)

    @cached_property
    def _temporal(self) -> tuple[Unit, ...]:
        """Temporal layers that feed each other form one unit."""
        groups: list[set[str]] = []
        for name in (name for name in self.reads if name in self._temporal_layers):
            joined = {name} | (self._feeds[name] & self._temporal_layers)
            touching = [group for group in groups if group & joined]
            groups = [group for group in groups if not group & joined] + [joined.union(*touching)]
        order = list(self.reads)
        units = [self._temporal_unit(sorted(group, key=order.index)) for group in groups]
        return tuple(sorted(units, key=lambda unit: order.index(unit.layers[0])))

    def _temporal_unit(self, layers: list[str]) -> Unit:
        reads = frozenset().union(*(self.reads[name] for name in layers))
        return Unit(
            f"temporal:{layers[0]}",
            "temporal",
            tuple(layers),
            tuple(sorted(reads)),
            self._features(layers),
        )

    def _features(self, layers: list[str]) -> tuple[str, ...]:
        """Those of the layers whose output meets the content with no other layer in between."""
        meeting: set[str] = set()
        for node in self._layer_graph.nodes:
            used = self._layer_graph.used_values(node)
            free = [value for value in used if not value.inputs & self._content]
            if len(free) < len(used):
                meeting.update(*(value.last_leaves for value in free))
        return tuple(name for name in layers if name in meeting)

    def inner_layers(self, unit: Unit) -> tuple[str, ...]:
        """The layers of a temporal unit whose output its other layers read."""
        read = frozenset().union(*(self._feeds[name] for name in unit.layers))
        return tuple(name for name in unit.layers if name in read)

    def chunks(self, layer: str) -> int:
        """Into how many parts the network splits a temporal layer's output; scale and shift: 2."""
        followed: set[int] = set()
        for node in self._layer_graph.nodes:
            if node.target == layer:
                followed.update(node.gives())
        for node in self._layer_graph.nodes:
            if not node.is_leaf and followed.intersection(node.uses()):
                if node.target in CHUNKS:
                    return node.args[1]
                if node.target in PASSED_ON:
                    followed.update(node.gives())
        return 1

    def answers_rows(self, layer: str) -> bool:
        """Whether a layer answers with one vector for each sample, or for each of its frames."""
        answers = (
            node.gives()[0] for name, node in self._layer_graph.leaf_nodes() if name == layer
        )
        return all(len(self._layer_graph.values[id].shape) == 2 for id in answers)

    def norm_before(self, layer: str) -> str | None:
        """The group norm whose output this layer reads directly, if no other call reads it."""
        nodes = self._layer_graph.nodes
        input_id = next(node.uses()[0] for node in nodes if node.target == layer)
        source = self._layer_graph.sources().get(input_id)
        readers = sum(input_id in node.uses() for node in nodes)
        if source is None or source.target is not torch.nn.functional.group_norm or readers != 1:
            return None
        arguments = leaves_of((source.args, source.kwargs))
        names = (argument.name for argument in arguments if isinstance(argument, Param))
        return next((name.rpartition(".")[0] for name in names), None)

    def temporal(self) -> list[Unit]:
        """The temporal information block: one unit, or several where each block has an embedder."""
        return list(self._temporal)

    @cached_property
    def _block_names(self) -> list[str]:
        """The outermost modules of the architecture's block classes."""
        names: list[str] = []
        for name, module in self.meta.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in names)
            if type(module).__name__ in self.architecture.blocks and not inside:
                names.append(name)
        return names

    def movable_blocks(self) -> tuple[str, ...]:
        """The blocks without the one that holds the model's first parameter, by name.

        In diffusers and here, the model's first parameter tells its device.
        """
        first = next(name for name, _ in self.meta.named_parameters())
        return tuple(name for name in self._block_names if not first.startswith(f"{name}."))

    def _block_of(self, layer: str) -> str | None:
        return next((name for name in self._block_names if layer.startswith(f"{name}.")), None)

    @cached_property
    def _units(self) -> tuple[Unit, ...]:
        plain = self.units_by_block(
            name for name in self.reads if name not in self._temporal_layers
        )
        order = list(self.reads)
        return tuple(
            sorted([*self._temporal, *plain], key=lambda unit: order.index(unit.layers[0]))
        )

    def units_by_block(self, layers: Iterable[str]) -> list[Unit]:
        """These layers grouped by block; a layer outside of blocks is a unit of its own."""
        grouped: dict[str, list[str]] = {}
        for name in layers:
            grouped.setdefault(self._block_of(name) or name, []).append(name)
        return [self._plain_unit(name, members) for name, members in grouped.items()]

    def _plain_unit(self, name: str, layers: list[str]) -> Unit:
        kind = "layer" if layers == [name] else "block"
        reads = frozenset().union(*(self.reads[layer] for layer in layers))
        return Unit(name, kind, tuple(layers), tuple(sorted(reads)))

    def units(self) -> list[Unit]:
        """A partition of the layers, in forward order."""
        return list(self._units)

    def blocks(self) -> list[Unit]:
        return [unit for unit in self._units if unit.kind == "block"]

    def ends(self) -> tuple[str, str]:
        """The first layer that reads the sample, and the last layer of all."""
        sample = self.parameters[0]
        first = next(name for name, inputs in self.reads.items() if sample in inputs)
        return first, list(self.reads)[-1]

    def shortcuts(self) -> list[str]:
        return [name for name in self.reads if "conv_shortcut" in name.split(".")]

    def concatenations(self) -> dict[str, int]:
        """Layers whose input is two concatenated tensors, and how many channels the first has."""
        sources = self._layer_graph.sources()
        widths: dict[str, int] = {}
        for name, node in self._layer_graph.leaf_nodes():
            width = self._first_width(self.all_layers[name], sources.get(node.uses()[0]))
            if width:
                widths[name] = width
        return widths

    def _first_width(self, layer: nn.Module, source: Node | None) -> int | None:
        """Channels of the first of two tensors that `source` concatenates for this layer."""
        if source is None or source.target not in JOINS or len(source.uses()) != 2:
            return None
        arguments = dict(zip(("tensors", "dim"), source.args, strict=False)) | source.kwargs
        shape = self._layer_graph.values[source.uses()[0]].shape
        channels = 1 if isinstance(layer, nn.Conv2d) else len(shape) - 1
        return shape[channels] if arguments.get("dim", 0) % len(shape) == channels else None

    def downsamplers(self) -> list[str]:
        return [name for name in self.reads if ".downsamplers." in name]

    def attention_blocks(self) -> list[str]:
        """Layers of blocks that are nothing but attention, as UNets without a text have them."""
        layers: list[str] = []
        for unit in self.blocks():
            if type(self.meta.get_submodule(unit.name)).__name__ == "Attention":
                layers += unit.layers
        return layers

    def attentions(self) -> list[str]:
        """Modules that compute attention through a diffusers attention processor."""
        return [
            name
            for name, module in self.meta.named_modules()
            if callable(getattr(module, "set_processor", None))
        ]

    @lru_cache(maxsize=4)  # noqa: B019 - DiT asks once for each of its temporal units
    def layer_graph(self, batch: int) -> Graph:
        """The whole forward pass with each layer as one node."""
        return self.graph(batch, dict(self.all_layers))

    @lru_cache(maxsize=4)  # noqa: B019 - an adapter lives as long as its job
    def block_graph(self, batch: int) -> Graph:
        """The whole forward pass with each block, and each layer outside of blocks, as one node."""
        names = [*self._block_names, *(name for name in self.reads if not self._block_of(name))]
        return self.graph(batch, {name: self.meta.get_submodule(name) for name in names})

    def temporal_graph(self, unit: Unit, batch: int) -> Graph:
        """From the unit's inputs to its features, for `batch` timesteps at once."""
        graph = self.layer_graph(batch)
        outputs = {name: node.gives()[0] for name, node in graph.leaf_nodes()}
        return graph.part([outputs[name] for name in unit.features])

    def bind(self, args: tuple, kwargs: dict[str, object]) -> Arguments:
        """The arguments of a call by name."""
        return dict(zip(self.parameters, args, strict=False)) | kwargs


def check_example(model: nn.Module, example: Mapping[str, object]) -> None:
    """An example must name the timestep, which is a tensor."""
    if not isinstance(example.get("timestep"), Tensor):
        raise BadInput(
            f"found {type(model).__name__} with inputs {', '.join(example)}",
            "a denoiser called (sample, timestep, ...)",
            "write an Architecture with the classes of its blocks and an example input, "
            "see docs/architecture.md",
        )
