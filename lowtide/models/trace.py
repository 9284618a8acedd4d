"""Record one forward pass as a graph of torch calls and module calls, and replay any part of it on other values.

Recorded on a copy of the model on the meta device, so it costs neither memory nor arithmetic. A leaf module (a layer, or
a whole block) becomes one node; everything between leaves is recorded call by call. Each value knows its dye: which of the
model's inputs it depends on. That is how the temporal block is found, how blocks are fed one after the other, and how a
part of the network is run without the rest. Shapes, the batch size among them, are those of the recording.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowtide.errors import BadInput


@dataclass(frozen=True)
class Ref:
    """A value of the graph, by number."""

    id: int


@dataclass(frozen=True)
class Param:
    """A parameter or buffer of the model, by name."""

    name: str


@dataclass(frozen=True)
class Node:
    """One call: `target` is a torch function, or the name of a leaf module."""

    target: Callable | str
    args: Any
    kwargs: Any
    output: Any
    frees: tuple[int, ...] = ()

    @property
    def is_leaf(self) -> bool:
        return isinstance(self.target, str)

    def uses(self) -> list[int]:
        return refs((self.args, self.kwargs))

    def gives(self) -> list[int]:
        return refs(self.output)


@dataclass(frozen=True)
class Value:
    """What is known of a value: shape, the inputs it depends on, and the leaves it comes from without another in between."""

    shape: tuple[int, ...]
    dye: frozenset[str] = frozenset()
    near: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Graph:
    """Nodes in the order they ran."""

    nodes: tuple[Node, ...]
    inputs: dict[str, int]
    output: Any
    values: dict[int, Value] = field(repr=False)

    def replay(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Run the graph on other values; equals the model's own forward pass."""
        given = flat_inputs(inputs)
        device = next(model.parameters()).device
        env: dict[int, Any] = {id: given[name] for name, id in self.inputs.items()}
        for node in self.nodes:
            env.update(run_node(node, model, env.__getitem__, device))
            for id in node.frees:
                env.pop(id, None)
        return mapped(self.output, lambda leaf: env[leaf.id] if isinstance(leaf, Ref) else leaf)

    def part(self, outputs: list[int]) -> "Graph":
        """The nodes that these values need, giving a list of them."""
        needed, nodes = set(outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.gives()):
                needed.update(node.uses())
                nodes.append(node)
        inputs = {name: id for name, id in self.inputs.items() if id in needed}
        return finished(nodes[::-1], inputs, [Ref(id) for id in outputs], self.values)


def run_node(
    node: Node, model: nn.Module, value: Callable[[int], Any], device: torch.device
) -> dict[int, Any]:
    """Run one node; the values it gives, by number."""

    def real(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return value(leaf.id)
        if isinstance(leaf, Param):
            return named_tensor(model, leaf.name)
        return device if isinstance(leaf, torch.device) else leaf

    target = model.get_submodule(node.target) if isinstance(node.target, str) else node.target
    result = target(*mapped(node.args, real), **mapped(node.kwargs, real))
    return dict(paired(node.output, result))


def written(tensor: Tensor, place: Any, value: Any) -> Tensor:
    """Writing by index, as a call that gives the tensor written to: Python's own gives None."""
    tensor[place] = value
    return tensor


def named_tensor(model: nn.Module, name: str) -> Tensor:
    holder, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(holder), leaf)


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nesting of tuples, lists and dicts with every leaf changed."""
    if isinstance(tree, torch.Size):
        return tree
    if isinstance(tree, tuple | list):
        changed = [mapped(item, change) for item in tree]
        return type(tree)(*changed) if hasattr(tree, "_fields") else type(tree)(changed)
    if isinstance(tree, Mapping):
        return {key: mapped(item, change) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(mapped(part, change) for part in (tree.start, tree.stop, tree.step)))
    return change(tree)


def leaves_of(tree: Any) -> list[Any]:
    found: list[Any] = []
    mapped(tree, found.append)
    return found


def refs(tree: Any) -> list[int]:
    return [leaf.id for leaf in leaves_of(tree) if isinstance(leaf, Ref)]


def paired(pattern: Any, result: Any) -> Iterable[tuple[int, Any]]:
    values = leaves_of(result)
    return (
        (leaf.id, value)
        for leaf, value in zip(leaves_of(pattern), values, strict=True)
        if isinstance(leaf, Ref)
    )


def flat_inputs(inputs: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Tensors by name; nested dicts get dotted names."""
    flat: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            flat |= flat_inputs(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            flat[prefix + name] = value
    return flat


def finished(
    nodes: list[Node], inputs: dict[str, int], output: Any, values: dict[int, Value]
) -> Graph:
    """Say for each node which values nobody needs after it."""
    last: dict[int, int] = {}
    for place, node in enumerate(nodes):
        last.update(dict.fromkeys([*node.gives(), *node.uses()], place))
    kept = set(refs(output))
    frees: dict[int, list[int]] = {}
    for id, place in last.items():
        if id not in kept:
            frees.setdefault(place, []).append(id)
    nodes = [replace(node, frees=tuple(frees.get(place, ()))) for place, node in enumerate(nodes)]
    return Graph(tuple(nodes), inputs, output, values)


class Recorder(TorchFunctionMode):
    """Listens to every torch call made outside the leaves."""

    def __init__(self, model: nn.Module, leaves: Mapping[str, nn.Module]):
        super().__init__()
        self.names = {
            id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        self.leaves, self.inside = leaves, 0
        self.nodes: list[Node] = []
        self.numbers: dict[int, int] = {}
        self.values: dict[int, Value] = {}
        # Tensors are told apart by identity, so none may be freed and its identity reused while recording.
        self.alive: list[Tensor] = []

    def number(self, tensor: Tensor, dye: frozenset[str], near: frozenset[str]) -> Ref:
        """The number of a value; a new one for a new tensor."""
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.numbers)
            self.alive.append(tensor)
        number = self.numbers[id(tensor)]
        self.values[number] = Value(tuple(tensor.shape), dye, near)
        return Ref(number)

    def known(self, leaf: Any) -> Any:
        """How an argument is written down."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self.numbers:
            return Ref(self.numbers[id(leaf)])
        if id(leaf) in self.names:
            return Param(self.names[id(leaf)])
        if leaf.is_meta:
            raise BadInput(
                "found a tensor made outside torch's functions",
                "a forward pass in plain torch",
                "write an adapter",
            )
        return leaf

    def note(self, target: Callable | str, args: Any, kwargs: Any, result: Any) -> None:
        args, kwargs = mapped(args, self.known), mapped(kwargs, self.known)
        used = [self.values[id] for id in refs((args, kwargs))]
        dye = frozenset().union(*(value.dye for value in used))
        near = (
            frozenset().union(*(value.near for value in used))
            if callable(target)
            else frozenset([target])
        )
        if getattr(target, "__name__", "") == "__setitem__":
            target, result = written, self.alive[args[0].id]
        given = mapped(
            result, lambda leaf: self.number(leaf, dye, near) if isinstance(leaf, Tensor) else None
        )
        self.nodes.append(Node(target, args, kwargs, given))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        changes = getattr(func, "__name__", "") == "__setitem__"
        if not self.inside and (
            changes or any(isinstance(leaf, Tensor) for leaf in leaves_of(result))
        ):
            self.note(func, args, kwargs, result)
        return result

    def listen(self) -> list[Any]:
        """Hooks that make each leaf one node."""
        hooks = []
        for name, module in self.leaves.items():
            hooks.append(module.register_forward_pre_hook(self.enter))
            hooks.append(module.register_forward_hook(self.leaving(name), with_kwargs=True))
        return hooks

    def enter(self, module: nn.Module, args: Any) -> None:
        self.inside += 1

    def leaving(self, name: str) -> Callable:
        def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            self.inside -= 1
            if not self.inside:
                self.note(name, args, kwargs, result)

        return leave


@torch.no_grad()
def record(model: nn.Module, inputs: Mapping[str, Any], leaves: Mapping[str, nn.Module]) -> Graph:
    """Run the model once on these inputs and write down what happens between the leaves."""
    recorder = Recorder(model, leaves)
    given = {
        name: recorder.number(tensor, frozenset([name]), frozenset()).id
        for name, tensor in flat_inputs(inputs).items()
    }
    hooks = recorder.listen()
    try:
        with recorder:
            result = model(**inputs)
    except (RuntimeError, TypeError) as error:
        raise BadInput(
            f"found {type(model).__name__} that fails on inputs {', '.join(given)} of shapes alone ({error})",
            "a forward pass that takes these inputs and decides nothing by their values",
            "correct the example input, or write an Architecture with one, see docs/architecture.md",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    output = mapped(result, recorder.known)
    return finished(recorder.nodes, given, output, recorder.values)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are shapes only."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)
