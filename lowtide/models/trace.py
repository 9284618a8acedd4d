"""Record one forward pass as a graph of torch calls and module calls; replay any part of it.

The recording runs on a copy of the model on the meta device, so it costs neither memory nor
arithmetic. A leaf module (a layer, or a whole block) becomes one node. Everything between leaves is
recorded call by call. Each value knows which of the model's inputs it depends on. This tells which
layers form the temporal block, in which order blocks feed each other, and what a part of the
network needs to run without the rest. All shapes, the batch size included, are those of the
recording.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lowtide.errors import BadInput
from lowtide.models.named_inputs import flat_inputs
from lowtide.models.plain_state import constants, forget_answers
from lowtide.models.tensor_state import TensorState, memory_of


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
    """One call: `target` is a torch function, or the name of a leaf module.

    `frees`: the numbers of the values that no later node uses. `writes`: the arguments that the
    call changes in place; `moves`: whether it changes their shape, or where they are in memory.
    """

    target: Callable | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: object
    frees: tuple[int, ...] = ()
    writes: tuple[object, ...] = ()
    moves: bool = False

    @property
    def is_leaf(self) -> bool:
        return isinstance(self.target, str)

    def uses(self) -> list[int]:
        return _refs((self.args, self.kwargs))

    def gives(self) -> list[int]:
        return _refs(self.output)

    def written(self) -> list[int]:
        """The values that the call changes in place."""
        return _refs(self.writes)


@dataclass(frozen=True)
class Value:
    """What is known of a value without computing it.

    `inputs`: the model's inputs that the value depends on.
    `last_leaves`: the leaves whose output reaches the value with no other leaf in between.
    `memory`: equal for two values that share memory.
    """

    shape: tuple[int, ...]
    inputs: frozenset[str] = frozenset()
    last_leaves: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32
    memory: int = 0


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they ran; `inputs` maps an input's name to its value's number."""

    nodes: tuple[Node, ...]
    inputs: dict[str, int]
    output: object
    values: dict[int, Value] = field(repr=False)

    def leaf_nodes(self) -> Iterator[tuple[str, Node]]:
        """The name of the leaf and the node, for each call of a leaf."""
        for node in self.nodes:
            if isinstance(node.target, str):
                yield node.target, node

    def output_numbers(self) -> list[int]:
        return _refs(self.output)

    def used_values(self, node: Node) -> list[Value]:
        return [self.values[id] for id in node.uses()]

    def sources(self) -> dict[int, Node]:
        """The last node that gives each value; the model's inputs have none."""
        sources: dict[int, Node] = {}
        for node in self.nodes:
            sources.update(dict.fromkeys(node.gives(), node))
        return sources

    def replay(self, model: nn.Module, inputs: Mapping[str, object]) -> Any:
        """Run the graph on other values; the result equals the model's own forward pass."""
        tensors = flat_inputs(inputs)
        device = next(model.parameters()).device
        values: dict[int, object] = {id: tensors[name] for name, id in self.inputs.items()}
        for node in self.nodes:
            values.update(run_node(node, model, values.__getitem__, device))
            for id in node.frees:
                values.pop(id, None)
        return mapped(self.output, lambda leaf: values[leaf.id] if isinstance(leaf, Ref) else leaf)

    def part(self, outputs: list[int]) -> "Graph":
        """The nodes that these values need; replaying them gives a list of the values."""
        needed = set(outputs)
        nodes: list[Node] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.gives()):
                needed.update(node.uses())
                nodes.append(node)
        inputs = {name: id for name, id in self.inputs.items() if id in needed}
        return _with_frees(nodes[::-1], inputs, [Ref(id) for id in outputs], self.values)


def run_node(
    node: Node, model: nn.Module, value: Callable[[int], object], device: torch.device
) -> dict[int, Any]:
    """Run one node; returns the values it gives, by number."""

    def real(leaf: object) -> object:
        if isinstance(leaf, Ref):
            return value(leaf.id)
        if isinstance(leaf, Param):
            # A block whose embedder is called from outside may lie elsewhere at the moment.
            return _named_tensor(model, leaf.name).to(device)
        return device if isinstance(leaf, torch.device) else leaf

    target = model.get_submodule(node.target) if isinstance(node.target, str) else node.target
    result = target(*mapped(node.args, real), **mapped(node.kwargs, real))
    return dict(_numbered(node.output, result))


def _set_item(tensor: Tensor, index: Any, value: Tensor | float) -> Tensor:
    """`tensor[index] = value` as a call that returns the tensor; Python's own call returns None."""
    tensor[index] = value
    return tensor


def _named_tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def mapped(tree: object, change: Callable[[object], object]) -> Any:
    """The same nesting of tuples, lists, dicts and slices with `change` applied to every leaf."""
    if isinstance(tree, torch.Size):
        return tree
    if isinstance(tree, tuple | list):
        changed = [mapped(item, change) for item in tree]
        return type(tree)(*changed) if hasattr(tree, "_fields") else type(tree)(changed)
    if isinstance(tree, Mapping):
        items = {key: mapped(item, change) for key, item in tree.items()}
        # The output classes of diffusers are dataclasses and mappings at once.
        return type(tree)(**items) if is_dataclass(tree) else items
    if isinstance(tree, slice):
        return slice(*(mapped(part, change) for part in (tree.start, tree.stop, tree.step)))
    return change(tree)


def leaves_of(tree: object) -> list[Any]:
    leaves: list[Any] = []
    mapped(tree, leaves.append)
    return leaves


def _refs(tree: object) -> list[int]:
    return [leaf.id for leaf in leaves_of(tree) if isinstance(leaf, Ref)]


def _numbered(pattern: object, result: object) -> Iterable[tuple[int, Any]]:
    """The leaves of a result that stand where the pattern holds a Ref, with its number."""
    pairs = zip(leaves_of(pattern), leaves_of(result), strict=True)
    return ((leaf.id, value) for leaf, value in pairs if isinstance(leaf, Ref))


def _with_frees(
    nodes: list[Node], inputs: dict[str, int], output: object, values: dict[int, Value]
) -> Graph:
    """The graph of these nodes, with each node's `frees` filled in."""
    last_use: dict[int, int] = {}
    for place, node in enumerate(nodes):
        last_use.update(dict.fromkeys([*node.gives(), *node.uses()], place))
    outputs = set(_refs(output))
    frees: dict[int, list[int]] = {}
    for id, place in last_use.items():
        if id not in outputs:
            frees.setdefault(place, []).append(id)
    nodes = [replace(node, frees=tuple(frees.get(place, ()))) for place, node in enumerate(nodes)]
    return Graph(tuple(nodes), inputs, output, values)


class _Recorder(TorchFunctionMode):
    """Records every torch call that is made outside of the leaves, and every call of a leaf."""

    def __init__(self, model: nn.Module, leaves: Mapping[str, nn.Module]):
        super().__init__()
        named_tensors = [*model.named_parameters(), *model.named_buffers(), *constants(model)]
        self.names = {id(tensor): name for name, tensor in named_tensors}
        self.owners = {memory_of(tensor): Param(name) for name, tensor in named_tensors}
        self.leaves = leaves
        # How many leaves are running at the moment, one inside the other.
        self.depth = 0
        self.nodes: list[Node] = []
        self.numbers: dict[int, int] = {}
        self.values: dict[int, Value] = {}
        # Tensors are identified by id(). Keep all of them alive, so that Python reuses no id.
        self.tensors: list[Tensor] = []

    def number(self, tensor: Tensor, inputs: frozenset[str], last_leaves: frozenset[str]) -> Ref:
        """The number of a value; a new tensor gets a new number."""
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.numbers)
            self.tensors.append(tensor)
        number = self.numbers[id(tensor)]
        facts = (tensor.dtype, memory_of(tensor))
        self.values[number] = Value(tuple(tensor.shape), inputs, last_leaves, *facts)
        return Ref(number)

    def symbol(self, leaf: object) -> object:
        """What stands for an argument in the graph: a Ref, a Param, or the argument itself."""
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

    def note(
        self,
        target: Callable | str,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        result: object,
        before: Mapping[Tensor, TensorState] = {},
    ) -> None:
        """Append a node for one call. `before`: the state of its arguments, if it changed some."""
        symbols = mapped(args, self.symbol)
        named_symbols = mapped(kwargs, self.symbol)
        used = [self.values[id] for id in _refs((symbols, named_symbols))]
        inputs = frozenset().union(*(value.inputs for value in used))
        if isinstance(target, str):
            last_leaves = frozenset([target])
        else:
            last_leaves = frozenset().union(*(value.last_leaves for value in used))
        if _sets_item(target):
            target = _set_item
            result = self.tensors[symbols[0].id]

        def numbered(leaf: object) -> Ref | None:
            return self.number(leaf, inputs, last_leaves) if isinstance(leaf, Tensor) else None

        now = {tensor: TensorState.of(tensor) for tensor in before}
        written = [tensor for tensor, state in before.items() if now[tensor] != state]
        # A write to a part of a parameter is a write to the parameter.
        writes = tuple(self.owners.get(memory_of(each), self.symbol(each)) for each in written)
        moves = any(now[tensor].form != before[tensor].form for tensor in written)
        output = mapped(result, numbered)
        node = Node(target, symbols, named_symbols, output, writes=writes, moves=moves)
        self.nodes.append(node)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        if func is Tensor.type_as:
            # The result depends on the type of the other tensor, not on its values.
            func = Tensor.to
            args = (args[0], args[1].dtype)
        before = {leaf: TensorState.of(leaf) for leaf in _tensors_of((args, kwargs))}
        result = func(*args, **kwargs)
        is_written = any(TensorState.of(leaf) != state for leaf, state in before.items())
        if is_written or _tensors_of(result):
            self.note(func, args, kwargs, result, before if is_written else {})
        return result

    def hook_leaves(self) -> list[RemovableHandle]:
        """Hooks that make each call of a leaf one node."""
        hooks = []
        for name, module in self.leaves.items():
            hooks.append(module.register_forward_pre_hook(self.enter))
            hooks.append(module.register_forward_hook(self.leaving(name), with_kwargs=True))
        return hooks

    def enter(self, module: nn.Module, args: tuple[object, ...]) -> None:
        self.depth += 1

    def leaving(self, name: str) -> Callable:
        def leave(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], result: object
        ) -> None:
            self.depth -= 1
            if not self.depth:
                self.note(name, args, kwargs, result)

        return leave


def _tensors_of(tree: object) -> list[Tensor]:
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def _sets_item(target: Callable | str) -> bool:
    return getattr(target, "__name__", "") == "__setitem__"


@torch.inference_mode(mode=False)  # tensors of that mode do not tell that they were written into
@torch.no_grad()
def record(
    model: nn.Module, inputs: Mapping[str, object], leaves: Mapping[str, nn.Module]
) -> Graph:
    """Run the model once on these inputs and record what happens between the leaves."""
    forget_answers(model)
    recorder = _Recorder(model, leaves)
    numbers = {
        name: recorder.number(tensor, frozenset([name]), frozenset()).id
        for name, tensor in flat_inputs(inputs).items()
    }
    hooks = recorder.hook_leaves()
    try:
        with recorder:
            result = model(**inputs)
    except BadInput:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        names = ", ".join(numbers)
        raise BadInput(
            f"found {type(model).__name__} that fails on inputs {names} of shapes alone ({error})",
            "a forward pass that takes these inputs and decides nothing by their values",
            "correct the example input, quantize without data (LowtideConfig, see "
            "docs/guides/diffusers.md), or write an Architecture",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        forget_answers(model)
    output = mapped(result, recorder.symbol)
    return _with_frees(recorder.nodes, numbers, output, recorder.values)


def on_meta(model: nn.Module, shared: Iterable[object] = ()) -> nn.Module:
    """A copy of the model whose parameters and buffers are on the meta device: shapes only.

    `shared`: objects in the model that are not copied.
    """
    memo: dict[int, object] = {id(each): each for each in shared}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)
