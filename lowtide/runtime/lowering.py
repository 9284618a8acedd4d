"""Lowering: a recorded forward pass becomes the steps of a program.

The walk follows the graph in order. Each call of torch that a native kernel covers becomes a
producer (runtime/producers.py), which waits for its readers; every other call becomes a step of
torch on the same memory. What is read by a packed layer is stored as codes.
"""

import math
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.formats import Adaptive, Affine
from lowtide.kernels import Spec, divide, native_library, unpack_weight
from lowtide.kernels.panels import Panels
from lowtide.models.trace import Graph, Node, Param, Ref, leaves_of, mapped
from lowtide.nn.attention import QuantAttention
from lowtide.nn.packed import Packed, PackedConv2d, PackedLinear
from lowtide.nn.quantizer import Quantizer
from lowtide.runtime.memory import (
    Buffer,
    Layout,
    View,
    is_whole,
    new_view,
    pixel_shape,
    pixels_of,
    tokens_of,
)
from lowtide.runtime.producers import Chain, GroupNorm, Joined, Producer, Product, Rows
from lowtide.runtime.steps import (
    AttentionStep,
    GemmStep,
    LayerNormStep,
    MomentsStep,
    Output,
    Padding,
    Rounding,
    Source,
    Step,
    StreamStep,
    TorchStep,
)

ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, operator.add)
MULTIPLIES = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, operator.mul)
DIVIDES = (torch.div, Tensor.div, Tensor.__truediv__, operator.truediv)
JOINS = (torch.cat, torch.concat)
MOMENT_PIXELS = 256  # pixels that one chunk of a group norm's moments covers
SMALL_WEIGHT = 2**17  # bytes of a packed weight that may be kept decoded
SINKS = native_library.SINKS


class Numbers:
    """The scales and zero points of the running step, at fixed addresses.

    `table`: steps x (2 * rows). A run copies the row of its step to `now`.
    """

    def __init__(self, quantizers: list[Quantizer], steps: int):
        self.rows = {quantizer.row: index for index, quantizer in enumerate(quantizers)}
        scales = [quantizer.scale.detach().float().expand(steps) for quantizer in quantizers]
        zeros = [_zeros_of(quantizer).float().expand(steps) for quantizer in quantizers]
        count = len(quantizers)
        self.table = torch.stack([*scales, *zeros], 1) if count else torch.empty(steps, 0)
        self.now = self.table[0].clone()
        self.count = count

    def rounding(self, quantizer: Quantizer, smooth: Tensor | None = None) -> Rounding:
        format = quantizer.format
        assert isinstance(format, Affine | Adaptive)
        row = self.rows[quantizer.row]
        columns = self.table[:, [row, self.count + row]].contiguous()
        divisors = None if smooth is None else smooth.numpy().tobytes()
        key = (columns.numpy().tobytes(), format.top, divisors)
        scale = self.now.data_ptr() + 4 * row
        return Rounding(scale, scale + 4 * self.count, format.top, smooth, key)


def _zeros_of(quantizer: Quantizer) -> Tensor:
    return quantizer.clock.zero[quantizer.row, : None if quantizer.per_step else 1]


@dataclass(frozen=True)
class NativeLayer:
    """A packed layer that the native kernels run: its weight, and its bias in float32."""

    panels: Panels
    bias: Tensor | None
    smooth: Tensor | None


@dataclass
class Lowered:
    """The steps, and the views that a run fills before them and reads after them.

    The first `conditional` steps read the conditions alone: the timestep, a label. They give the
    features, and do not run again while the conditions stay.
    """

    steps: list[Step | TorchStep]
    conditional: int
    conditions: dict[str, View]
    inputs: dict[str, View]
    features: list[View]
    output: Any
    kept: list[Any] = field(default_factory=list)


class Lowering:
    """One walk over a graph."""

    def __init__(
        self,
        root: nn.Module,
        graph: Graph,
        numbers: Numbers,
        layers: dict[str, NativeLayer],
        conditions: frozenset[str],
    ):
        self.root = root
        self.graph = graph
        self.numbers = numbers
        self.layers = layers
        self.conditions = conditions
        self.views: dict[int, View] = {}
        self.producers: dict[Buffer, Producer] = {}
        self.identities: dict[Buffer, dict[tuple, Chain]] = {}
        self.steps: list[Step | TorchStep] = []
        self.kept: list[Any] = []
        self.readers: Counter[int] = Counter()
        # Which values, numbers of the graph, are views of a buffer.
        self.names: dict[Buffer, list[int]] = {}
        self.attentions = {
            name: module
            for name, module in root.named_modules()
            if isinstance(getattr(module, "processor", None), QuantAttention)
        }
        self.handlers = self._handlers()

    def lower(self) -> Lowered:
        nodes = [node for node in self.graph.nodes if not _is_identity(node)]
        for node in nodes:
            self.readers.update(node.uses())
        self.readers.update(_output_ids(self.graph))
        inputs = {
            name: self._input(id) for name, id in self.graph.inputs.items() if self.readers[id]
        }
        early = [node for node in nodes if self._is_conditional(node)]
        late = [node for node in nodes if not self._is_conditional(node)]
        for node in early:
            self._lower(node)
        features = self._features(late)
        conditional = len(self.steps)
        for node in late:
            self._lower(node)
        output = mapped(self.graph.output, self._finished)
        conditions = {name: view for name, view in inputs.items() if name in self.conditions}
        content = {name: view for name, view in inputs.items() if name not in self.conditions}
        return Lowered(self.steps, conditional, conditions, content, features, output, self.kept)

    def _is_conditional(self, node: Node) -> bool:
        """Whether a call depends on nothing but the conditions."""
        values = [self.graph.values[id] for id in [*node.uses(), *node.gives()]]
        return all(value.inputs <= self.conditions for value in values)

    def _features(self, late: list[Node]) -> list[View]:
        """What the late calls read of the early ones, in memory that stays between runs."""
        used = {id for node in late for id in node.uses()} | set(_output_ids(self.graph))
        views = [self._floats(self.views[id]) for id in sorted(used & set(self.views))]
        self._settle_all()
        wholes: dict[Buffer, View] = {}
        for view in views:
            if view.buffer.fixed is None:
                view.buffer.fixed = torch.empty(view.buffer.nbytes, dtype=torch.uint8).view(
                    view.meta.dtype
                )
                wholes[view.buffer] = _flat(view)
        return list(wholes.values())

    def _finished(self, leaf: Any) -> Any:
        return self._floats(self._view(leaf.id)) if isinstance(leaf, Ref) else leaf

    def _input(self, id: int) -> View:
        shape = self.graph.values[id].shape
        kind = self.graph.values[id].dtype
        meta = torch.empty(shape, dtype=kind, device="meta")
        if len(shape) == 4:
            batch, channels, height, width = shape
            meta = pixel_shape(batch, height, width, channels).to(kind)
        view = new_view(_same_strides(meta, kind), fixed=True)
        self._name(id, view)
        return view

    def _name(self, id: int, view: View) -> None:
        self.views[id] = view
        self.names.setdefault(view.buffer, []).append(id)

    def _view(self, id: int) -> View:
        return self.views[id]

    # The walk

    def _lower(self, node: Node) -> None:
        handler = self._leaf if isinstance(node.target, str) else self.handlers.get(node.target)
        result = handler(node) if handler is not None else None
        if result is None:
            self._torch(node)
        else:
            self._name(node.gives()[0], result)

    def _handlers(self) -> dict[Callable | str, Callable[[Node], View | None]]:
        handlers: dict[Callable | str, Callable[[Node], View | None]] = {
            F.group_norm: self._group_norm,
            F.layer_norm: self._layer_norm,
            F.silu: self._activation,
            F.gelu: self._activation,
            torch._C._nn.gelu: self._activation,
            F.dropout: self._dropout,
            F.interpolate: self._interpolate,
            F.pad: self._pad,
            torch._C._nn.pad: self._pad,
            F.scaled_dot_product_attention: self._attention,
            Tensor.contiguous: self._contiguous,
        }
        handlers |= dict.fromkeys(JOINS, self._join)
        handlers |= dict.fromkeys(ADDS, self._add)
        handlers |= dict.fromkeys(MULTIPLIES, self._multiply)
        handlers |= dict.fromkeys(DIVIDES, self._divide)
        return handlers

    # Calls of torch

    def _torch(self, node: Node, function: Callable | None = None, reason: str = "") -> None:
        """A view of what is in memory, or a step of torch."""
        given = mapped((node.args, node.kwargs), self._given)
        metas = mapped(given, _meta_of)
        function = function or self._function(node)
        if not isinstance(node.target, str) and self._is_view(node, metas, given):
            return
        views = [leaf for leaf in leaves_of(given) if isinstance(leaf, View)]
        changed = [view for view in views[:1] if _changes_in_place(node.target)]
        if changed:
            self._settle_all()
        views = [self._floats(view) for view in views]
        patterns = leaves_of(node.output)
        results: list[View] = []
        for pattern in patterns:
            if isinstance(pattern, Ref) and not changed:
                results.append(self._result(pattern.id))
            elif isinstance(pattern, Ref):
                self._name(pattern.id, changed[0])
        args, kwargs = given
        name = node.target if isinstance(node.target, str) else _name_of(node.target)
        step = TorchStep(name, function, args, kwargs, results, reason, changed, views)
        self.steps.append(step)

    def _function(self, node: Node) -> Callable:
        if isinstance(node.target, str):
            return self.root.get_submodule(node.target)
        return node.target

    def _given(self, leaf: Any) -> Any:
        """A View for a value, a tensor of the model for a parameter, or the argument itself."""
        if isinstance(leaf, Ref):
            return self._view(leaf.id)
        if isinstance(leaf, Param):
            return self._parameter(leaf)
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return leaf

    def _parameter(self, leaf: Param) -> Tensor:
        owner, _, attribute = leaf.name.rpartition(".")
        return getattr(self.root.get_submodule(owner), attribute)

    def _result(self, id: int) -> View:
        """A place for a result of torch; images get their channels side by side."""
        value = self.graph.values[id]
        meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
        if meta.dim() == 4 and meta.dtype == torch.float32:
            batch, channels, height, width = meta.shape
            meta = pixel_shape(batch, height, width, channels)
        view = new_view(meta)
        self._name(id, view)
        return view

    def _is_view(self, node: Node, metas: tuple, given: tuple) -> bool:
        """Name the results if the call only gives views of its arguments."""
        if _changes_in_place(node.target):
            return False
        views = [leaf for leaf in leaves_of(given) if isinstance(leaf, View)]
        if not views:
            return False
        args, kwargs = metas
        results = leaves_of(node.target(*args, **kwargs))
        patterns = leaves_of(node.output)
        pairs = [
            (pattern, result)
            for pattern, result in zip(patterns, results, strict=True)
            if isinstance(pattern, Ref)
        ]
        owners = [_owner(result, views) for _, result in pairs]
        if not pairs or None in owners:
            return False
        for (pattern, result), owner in zip(pairs, owners, strict=True):
            assert owner is not None
            self._name(pattern.id, View(owner.buffer, result))
        return True

    # Settling: from a producer to memory

    def _settle_all(self) -> None:
        for buffer in list(self.producers):
            self._settle(buffer)

    def _floats(self, view: View) -> View:
        """The view, whose values are in memory from here on."""
        self._settle(view.buffer)
        return view

    def _settle(self, buffer: Buffer) -> None:
        producer = self.producers.pop(buffer, None)
        whole = None if producer is None else self._whole(buffer)
        if isinstance(producer, Product):
            self._emit(producer)
        elif isinstance(producer, Joined):
            self._emit_joined(producer, whole)
        elif isinstance(producer, Chain):
            self._emit_chain(producer, whole)
        elif isinstance(producer, Rows):
            self._emit_rows(producer, whole)

    def _whole(self, buffer: Buffer) -> View:
        return self.roots[buffer]

    @property
    def roots(self) -> dict[Buffer, View]:
        return self.__dict__.setdefault("_roots", {})

    def _virtual(self, meta: Tensor, producer: Producer) -> View:
        """A value that waits for its readers."""
        view = new_view(meta)
        self.producers[view.buffer] = producer
        self.roots[view.buffer] = view
        return view

    def _emit(self, product: Product) -> None:
        step = product.step
        for view in (step.per_sample, step.gate, step.residual):
            if view is not None:
                self._floats(view)
        self.steps.append(step)

    def _emit_joined(self, joined: Joined, whole: View) -> None:
        first = 0
        for part in joined.parts:
            self._floats(part)
            count = part.shape[1] if part.meta.dim() == 4 else part.shape[-1]
            axis = 1 if part.meta.dim() == 4 else -1
            target = View(whole.buffer, whole.meta.narrow(axis, first, count))
            first += count
            copy = TorchStep("copy", _same, (part,), {}, [target], "", [], [part])
            self.steps.append(copy)

    def _emit_chain(self, chain: Chain, whole: View) -> None:
        if chain.padding != Padding():
            self._emit_padding(chain, whole)
            return
        layout = _channels_layout(whole.meta)
        assert layout is not None
        self._output(chain, Output(whole, layout, upsample=chain.upsample))

    def _emit_padding(self, chain: Chain, whole: View) -> None:
        inner = replace(chain, padding=Padding(), steps=[], codes={})
        batch, channels, height, width = whole.shape
        padding = chain.padding
        size = (height - padding.above - padding.below, width - padding.left - padding.right)
        source = self._floats(self._virtual(pixel_shape(batch, *size, channels), inner))
        amounts = (padding.left, padding.right, padding.above, padding.below)
        self.steps.append(TorchStep("pad", F.pad, (source, amounts), {}, [whole], "", [], [source]))

    def _emit_rows(self, rows: Rows, whole: View) -> None:
        layout = _layout(whole.meta)
        assert layout is not None
        self._row_output(rows, Output(whole, layout))

    def _output(self, chain: Chain, output: Output) -> None:
        """Add an output to the chain's latest stream, or to a new one."""
        height, width = _inner_size(output, chain)
        layouts = [layout.reshaped(height, width) for layout in chain.layouts]
        assert None not in layouts
        last = chain.steps[-1] if chain.steps else None
        fits = (
            last is not None and len(last.outputs) < SINKS and last.sources[0].layout == layouts[0]
        )
        if last is not None and fits:
            last.outputs.append(output)
            return
        sources = [
            Source(self._floats(view), layout)
            for view, layout in zip(chain.sources, layouts, strict=True)
            if layout is not None
        ]
        step = StreamStep(sources, chain.activation)
        if chain.norm is not None:
            step.gain, step.offset = self._moments(chain)
        if chain.times is not None:
            times = _layout(self._floats(chain.times).meta)
            assert times is not None
            reshaped = times.reshaped(height, width)
            assert reshaped is not None
            step.times = Source(chain.times, reshaped)
        step.outputs.append(output)
        chain.steps.append(step)
        self.steps.append(step)

    def _moments(self, chain: Chain) -> tuple[View, View]:
        """Emit the moments of the chain's group norm, once."""
        for step in chain.steps:
            if step.gain is not None and step.offset is not None:
                return step.gain, step.offset
        norm = chain.norm
        assert norm is not None
        first = chain.layouts[0]
        blocks = max(1, -(-first.pixels // MOMENT_PIXELS))
        channels = chain.channels
        gain = new_view(torch.empty(first.batch, channels, device="meta"))
        offset = new_view(torch.empty(first.batch, channels, device="meta"))
        partial = new_view(torch.empty(first.batch, blocks, 2, channels, device="meta"))
        lines = [layout.reshaped(1, layout.pixels) for layout in chain.layouts]
        sources = [
            Source(view, line)
            for view, line in zip(chain.sources, lines, strict=True)
            if line is not None
        ]
        fields = (norm.groups, norm.epsilon, norm.weight, norm.bias, gain, offset, partial, blocks)
        self.steps.append(MomentsStep(sources, *fields))
        return gain, offset

    def _row_output(self, rows: Rows, output: Output) -> None:
        last = rows.steps[-1] if rows.steps else None
        if last is not None and len(last.outputs) < SINKS:
            last.outputs.append(output)
            return
        source = Source(self._floats(rows.source), rows.layout)
        for view in (rows.gain, rows.shift):
            if view is not None:
                self._floats(view)
        fields = (rows.epsilon, rows.weight, rows.bias, rows.gain, rows.shift)
        step = LayerNormStep(source, *fields)
        step.outputs.append(output)
        rows.steps.append(step)
        self.steps.append(step)

    # Norms and activations

    def _group_norm(self, node: Node) -> View | None:
        arguments = _bound(node, ("input", "num_groups", "weight", "bias", "eps"))
        view = self._given(arguments["input"])
        sources = self._sources(view)
        if sources is None:
            return None
        views, layouts = sources
        if any(layout.reshaped(1, layout.pixels) is None for layout in layouts):
            return None
        weight, bias = (self._float32(arguments.get(name)) for name in ("weight", "bias"))
        norm = GroupNorm(arguments["num_groups"], arguments.get("eps", 1e-5), weight, bias)
        return self._virtual(_dense_like(view.meta), Chain(views, layouts, norm))

    def _float32(self, leaf: Any) -> Tensor | None:
        """A parameter as contiguous float32, kept alive with the program."""
        if leaf is None:
            return None
        tensor = self._given(leaf).detach().float().contiguous()
        self.kept.append(tensor)
        return tensor

    def _sources(self, view: View) -> tuple[list[View], list[Layout]] | None:
        """The values to read and where their pixels are: two for values that wait side by side."""
        producer = self.producers.get(view.buffer)
        parts = [view]
        if (
            isinstance(producer, Joined)
            and view.meta.stride() == self.roots[view.buffer].meta.stride()
        ):
            parts = producer.parts
        layouts = [_channels_layout(part.meta) for part in parts]
        if None in layouts or any(part.meta.dtype != torch.float32 for part in parts):
            return None
        return parts, [layout for layout in layouts if layout is not None]

    def _layer_norm(self, node: Node) -> View | None:
        arguments = _bound(node, ("input", "normalized_shape", "weight", "bias", "eps"))
        view = self._given(arguments["input"])
        layout = tokens_of(view.meta) if view.meta.dim() > 2 else None
        single = len(arguments["normalized_shape"]) == 1
        if layout is None or not single or view.meta.dtype != torch.float32:
            return None
        weight, bias = (self._float32(arguments.get(name)) for name in ("weight", "bias"))
        rows = Rows(view, layout, arguments.get("eps", 1e-5), weight, bias)
        return self._virtual(torch.empty(view.shape, device="meta"), rows)

    def _activation(self, node: Node) -> View | None:
        view = self._given(node.args[0])
        activation = _activation_of(node)
        chain = self._chain(view)
        if activation is None or chain is None:
            return None
        free = chain.activation == native_library.IDENTITY and chain.times is None
        if not free or not chain.is_unshaped or self.producers.get(view.buffer) is not chain:
            chain = self._identity(view)
        if chain is None:
            return None
        fields = (chain.sources, chain.layouts, chain.norm, activation)
        return self._virtual(_dense_like(view.meta), Chain(*fields))

    def _chain(self, view: View) -> Chain | None:
        """The chain that waits behind this view, or one that reads the view as it is."""
        producer = self.producers.get(view.buffer)
        if (
            isinstance(producer, Chain)
            and is_whole(view)
            and _same_order(view, self.roots[view.buffer])
        ):
            return producer
        return self._identity(view)

    def _identity(self, view: View) -> Chain | None:
        """A chain that only reads; views with the same pixels share it."""
        key = (view.meta.storage_offset(), tuple(view.shape), view.meta.stride())
        known = self.identities.setdefault(view.buffer, {})
        if key not in known:
            sources = self._sources(view)
            if sources is None:
                return None
            known[key] = Chain(*sources)
        return known[key]

    def _dropout(self, node: Node) -> View | None:
        arguments = _bound(node, ("input", "p", "training", "inplace"))
        idle = not arguments.get("training", True) or not arguments.get("p", 0.5)
        return self._given(arguments["input"]) if idle else None

    def _contiguous(self, node: Node) -> View | None:
        """The same values: in what order they lie is this program's own business."""
        return self._given(node.args[0]) if not node.kwargs and len(node.args) == 1 else None

    def _interpolate(self, node: Node) -> View | None:
        view = self._given(node.args[0])
        wanted = self.graph.values[node.gives()[0]].shape
        nearest = node.kwargs.get("mode", "nearest") == "nearest"
        doubled = [2 * size for size in view.shape[2:]]
        chain = self._chain(view) if view.meta.dim() == 4 else None
        if chain is None or not nearest or list(wanted[2:]) != doubled or not chain.is_unshaped:
            return None
        shaped = replace(chain, upsample=2, steps=[], codes={})
        return self._virtual(pixel_shape(wanted[0], *wanted[2:], wanted[1]), shaped)

    def _pad(self, node: Node) -> View | None:
        arguments = _bound(node, ("input", "pad", "mode", "value"))
        view = self._given(arguments["input"])
        amounts = arguments["pad"]
        constant = arguments.get("mode", "constant") == "constant" and not arguments.get("value")
        chain = self._chain(view) if view.meta.dim() == 4 else None
        plain = constant and len(amounts) == 4 and min(amounts) >= 0
        if chain is None or not plain or chain.norm is not None:
            return None
        left, right, above, below = amounts
        padding = chain.padding.plus(Padding(above, left, below, right))
        shape = self.graph.values[node.gives()[0]].shape
        shaped = replace(chain, padding=padding, steps=[], codes={})
        return self._virtual(pixel_shape(shape[0], *shape[2:], shape[1]), shaped)

    def _join(self, node: Node) -> View | None:
        arguments = _bound(node, ("tensors", "dim"))
        parts = [self._given(part) for part in arguments["tensors"]]
        dims = parts[0].meta.dim()
        axis = arguments.get("dim", 0) % dims
        channels = 1 if dims == 4 else dims - 1
        if len(parts) != 2 or axis != channels or dims not in (3, 4):
            return None
        if any(_channels_layout(part.meta) is None for part in parts):
            return None
        shape = self.graph.values[node.gives()[0]].shape
        meta = torch.empty(shape, device="meta")
        if dims == 4:
            meta = pixel_shape(shape[0], *shape[2:], shape[1])
        return self._virtual(meta, Joined(parts))

    # Arithmetic, which joins the epilogue of a product or the gain of a norm

    def _two(self, node: Node) -> list[tuple[View, Any, int]]:
        """The operands of a commutative call, both ways: (view, other, number of the view)."""
        ways: list[tuple[View, Any, int]] = []
        if node.kwargs or len(node.args) != 2:
            return ways
        for mine, other in (node.args, node.args[::-1]):
            if isinstance(mine, Ref):
                ways.append((self._given(mine), self._given(other), mine.id))
        return ways

    def _product(self, view: View) -> Product | None:
        """The product behind this view, if nobody else reads it and the view is all of it."""
        product = self.producers.get(view.buffer)
        if not isinstance(product, Product) or not is_whole(view):
            return None
        names = self.names.get(view.buffer, [])
        once = all(self.readers[id] <= 1 for id in names)
        return product if once else None

    def _add(self, node: Node) -> View | None:
        shape = self.graph.values[node.gives()[0]].shape
        for view, other, _ in self._two(node):
            if tuple(view.shape) != tuple(shape):
                continue
            product = self._product(view)
            if product is not None and isinstance(other, View):
                added = self._add_to_product(product, view, other)
                if added is not None:
                    return added
            shifted = self._shift_rows(view, other)
            if shifted is not None:
                return shifted
        return None

    def _add_to_product(self, product: Product, view: View, other: View) -> View | None:
        if other.meta.dtype != torch.float32:
            return None
        vector = _vector(other.meta, view.meta)
        if vector is not None and product.can_add_per_sample():
            product.step.per_sample = View(other.buffer, vector)
            return view
        same = other.shape == view.shape and _same_order(view, other)
        if (
            same
            and is_dense(other.meta)
            and product.can_add_residual()
            and other.buffer is not view.buffer
        ):
            product.step.residual = other
            return view
        return None

    def _shift_rows(self, view: View, other: Any) -> View | None:
        """A shift of each sample after a layer norm."""
        rows = self._lone_rows(view)
        vector = _vector(other.meta, view.meta) if isinstance(other, View) else None
        if rows is None or vector is None or rows.shift is not None or rows.gain is None:
            return None
        shifted = replace(rows, shift=View(other.buffer, vector), steps=[], codes={})
        return self._virtual(torch.empty(view.shape, device="meta"), shifted)

    def _lone_rows(self, view: View) -> Rows | None:
        rows = self.producers.get(view.buffer)
        whole = isinstance(rows, Rows) and is_whole(view) and view.meta.is_contiguous()
        return rows if isinstance(rows, Rows) and whole else None

    def _multiply(self, node: Node) -> View | None:
        shape = self.graph.values[node.gives()[0]].shape
        for view, other, _ in self._two(node):
            if tuple(view.shape) != tuple(shape):
                continue
            if isinstance(other, View):
                result = self._times(view, other)
            else:
                result = self._scaled(view, other)
            if result is not None:
                return result
        return None

    def _times(self, view: View, other: View) -> View | None:
        vector = _vector(other.meta, view.meta)
        if other.meta.dtype != torch.float32 or view.meta.dtype != torch.float32:
            return None
        product = self._product(view)
        if vector is not None and product is not None and product.can_gate():
            product.step.gate = View(other.buffer, vector)
            return view
        rows = self._lone_rows(view)
        if vector is not None and rows is not None and rows.gain is None and rows.shift is None:
            gained = replace(rows, gain=View(other.buffer, vector), steps=[], codes={})
            return self._virtual(torch.empty(view.shape, device="meta"), gained)
        chain = self.producers.get(view.buffer)
        gates = isinstance(chain, Chain) and chain.times is None and chain.is_unshaped
        if gates and other.shape == view.shape and _layout(other.meta) is not None:
            timed = replace(chain, times=other, steps=[], codes={})
            return self._virtual(_dense_like(view.meta), timed)
        return None

    def _scaled(self, view: View, number: Any) -> View | None:
        """The view times a number, in the epilogue of the product before it."""
        if not isinstance(number, int | float) or isinstance(number, bool):
            return None
        if number == 1 and view.meta.is_floating_point():
            return view
        product = self._product(view)
        if product is None:
            return None
        product.step.factor *= float(number)
        return view

    def _divide(self, node: Node) -> View | None:
        if node.kwargs or len(node.args) != 2 or not isinstance(node.args[0], Ref):
            return None
        number = node.args[1]
        if not isinstance(number, int | float) or isinstance(number, bool):
            return None
        view = self._given(node.args[0])
        if number == 1 and view.meta.is_floating_point():
            return view
        return self._scaled(view, 1 / number) if _is_power_of_two(number) else None

    # Layers

    def _leaf(self, node: Node) -> View | None:
        name = node.target
        assert isinstance(name, str)
        module = self.root.get_submodule(name)
        layer = self.layers.get(name)
        if len(node.args) != 1 or node.kwargs:
            return None
        if layer is None:
            return self._float_input(node, module)
        view = self._given(node.args[0])
        if isinstance(module, PackedConv2d):
            return self._conv(name, module, layer, view)
        assert isinstance(module, PackedLinear)
        return self._linear(name, module, layer, view)

    def _float_input(self, node: Node, module: nn.Module) -> View | None:
        """A small packed layer whose inputs are in float: its weight is decoded once."""
        small = isinstance(module, Packed) and math.prod(module.weight.shape) <= SMALL_WEIGHT
        if not small or module.input.format is not None:
            return None
        assert isinstance(module, PackedConv2d | PackedLinear)
        self._torch(node, decoded(module))
        return self.views[node.gives()[0]]

    def _conv(self, name: str, module: PackedConv2d, layer: NativeLayer, view: View) -> View | None:
        if view.meta.dim() != 4:
            return None
        vertical, horizontal = _pair(module.padding)
        own = Padding(vertical, horizontal, vertical, horizontal)
        rounding = self.numbers.rounding(module.input, layer.smooth)
        codes = self._codes(view, rounding, own)
        if codes is None:
            return None
        height, width = module.kernel_size
        step_down, step_right = _pair(module.stride)
        out_height = (codes.layout.height - height) // step_down + 1
        out_width = (codes.layout.width - width) // step_right + 1
        layout = codes.layout
        taps = [
            down * layout.row + right * layout.column
            for down, right in ((i // width, i % width) for i in range(height * width))
        ]
        meta = pixel_shape(layout.batch, out_height, out_width, module.out_channels)
        stride = (step_down, step_right)
        return self._gemm(name, layer, rounding, codes, taps, stride, meta)

    def _linear(
        self, name: str, module: PackedLinear, layer: NativeLayer, view: View
    ) -> View | None:
        rounding = self.numbers.rounding(module.input, layer.smooth)
        codes = self._codes(view, rounding, None)
        if codes is None:
            return None
        meta = torch.empty(*view.shape[:-1], module.out_features, device="meta")
        return self._gemm(name, layer, rounding, codes, [0], (1, 1), meta)

    def _gemm(
        self,
        name: str,
        layer: NativeLayer,
        rounding: Rounding,
        codes: Output,
        taps: list[int],
        stride: tuple[int, int],
        meta: Tensor,
    ) -> View:
        view = new_view(meta)
        layout = _layout(meta)
        assert layout is not None
        step = GemmStep(
            name=name,
            codes=codes.view,
            codes_layout=codes.layout,
            rounding=rounding,
            taps=torch.tensor(taps, dtype=torch.int64),
            weight=layer.panels,
            bias=layer.bias,
            stride=stride,
            output=Output(view, layout),
        )
        self.producers[view.buffer] = Product(step, view)
        self.roots[view.buffer] = view
        return view

    def _codes(self, view: View, rounding: Rounding, padding: Padding | None) -> Output | None:
        """The codes of a layer's input, from whatever waits behind it."""
        if view.meta.dtype != torch.float32:
            return None
        rows = self._lone_rows(view) if padding is None else None
        if rows is not None:
            return self._row_codes(rows, rounding)
        chain = self._chain(view)
        if chain is None:
            return None
        folded = self._fold(chain, view, rounding) if padding is None else None
        if folded is not None:
            return folded
        size = self._size(view, chain, padding)
        if size is None:
            return None
        total = chain.padding.plus(padding or Padding())
        key = (rounding.key, size, total)
        if key not in chain.codes:
            batch = chain.layouts[0].batch
            layout = code_layout(batch, *size, chain.channels, chain.upsample, total)
            output = Output(_code_view(layout), layout, rounding, total, chain.upsample)
            self._output(chain, output)
            chain.codes[key] = output
        return chain.codes[key]

    def _size(self, view: View, chain: Chain, padding: Padding | None) -> tuple[int, int] | None:
        """Height and width of the pixels before upsampling and padding, as the reader sees them."""
        first = chain.layouts[0]
        if padding is None:
            size = (first.height, first.width)
            matches = chain.is_unshaped and view.shape[-1] == chain.channels
            return (
                size
                if matches and view.meta.numel() == first.batch * first.pixels * chain.channels
                else None
            )
        if not chain.is_unshaped or chain.upsample != 1:
            return first.height, first.width
        size = (view.shape[2], view.shape[3])
        fits = all(layout.reshaped(*size) is not None for layout in chain.layouts)
        return size if fits and view.shape[1] == chain.channels else None

    def _row_codes(self, rows: Rows, rounding: Rounding) -> Output:
        key = (rounding.key,)
        if key not in rows.codes:
            source = rows.layout
            layout = code_layout(source.batch, source.height, 1, source.channels, 1, Padding())
            output = Output(_code_view(layout), layout, rounding)
            self._row_output(rows, output)
            rows.codes[key] = output
        return rows.codes[key]

    def _fold(self, chain: Chain, view: View, rounding: Rounding) -> Output | None:
        """The activation and the rounding in the epilogue of the product that the chain reads."""
        source = chain.sources[0]
        if not chain.is_plain or len(chain.sources) != 1 or chain.steps:
            return None
        product = self._product(source)
        alone = all(self.readers[id] <= 1 for id in self.names.get(view.buffer, []))
        if product is None or not alone or product.step.output.rounding is not None:
            return None
        step = product.step
        late = step.gate is not None or step.residual is not None or step.factor != 1.0
        if late and chain.activation != native_library.IDENTITY:
            return None
        layout = step.output.layout
        if layout.channels != view.shape[-1]:
            return None
        codes = code_layout(
            layout.batch, layout.height, layout.width, layout.channels, 1, Padding()
        )
        step.activation = chain.activation
        step.output = Output(_code_view(codes), codes, rounding)
        self.producers.pop(source.buffer)
        self._emit(product)
        return step.output

    # Attention

    def _attention(self, node: Node) -> View | None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        arguments = _bound(node, names)
        query = arguments["query"]
        processor = self._processor(query)
        if processor is None:
            return None
        if not self._is_native_attention(processor, arguments):
            self._torch(node, processor.attend)
            return self.views[node.gives()[0]]
        views = [self._floats(self._given(arguments[name])) for name in names[:3]]
        batch, heads, queries, width = views[0].shape
        meta = torch.empty(batch, queries, heads, width, device="meta").transpose(1, 2)
        output = new_view(_same_strides(meta, torch.float32))
        mask = arguments.get("attn_mask")
        bias = None if mask is None else self._floats(self._given(mask))
        parts = processor.quantizers()
        step = AttentionStep(
            *views,
            output=output,
            roundings={name: self.numbers.rounding(each) for name, each in parts.items()},
            adaptive=isinstance(processor.softmax.format, Adaptive),
            factor=arguments.get("scale") or 1 / math.sqrt(width),
            bias=bias,
            scratch=View(Buffer(0), torch.empty(0, dtype=torch.uint8, device="meta")),
        )
        size = native_library.native().attention_scratch(step.structure(lambda view: 0))
        step.scratch = new_view(torch.empty(size, dtype=torch.uint8, device="meta"))
        self.steps.append(step)
        return output

    def _processor(self, query: Any) -> QuantAttention | None:
        """The processor of the attention block whose layers gave the query."""
        leaves = self.graph.values[query.id].last_leaves
        for name, module in self.attentions.items():
            if any(leaf.startswith(f"{name}.") for leaf in leaves):
                return module.processor
        return None

    def _is_native_attention(self, processor: QuantAttention, arguments: dict[str, Any]) -> bool:
        parts = processor.quantizers()
        affine = all(isinstance(parts[name].format, Affine) for name in ("q", "k", "v"))
        softmax = isinstance(parts["softmax"].format, Affine | Adaptive)
        plain = not arguments.get("dropout_p") and not arguments.get("is_causal")
        views = [self._given(arguments[name]) for name in ("query", "key", "value")]
        shaped = all(view.meta.dim() == 4 and view.meta.stride(-1) == 1 for view in views)
        mask = arguments.get("attn_mask")
        masked = mask is None or _is_key_bias(self._given(mask).meta, views[0], views[1])
        return affine and softmax and plain and shaped and masked


def decoded(layer: PackedConv2d | PackedLinear) -> Callable[[Tensor], Tensor]:
    """The layer on its weight as float32."""
    *tables, smooth = layer.tables()
    values = unpack_weight(layer.codes(), [*tables, smooth], Spec.of(layer.spec))
    bias = None if layer.bias is None else layer.bias.detach().float()
    if isinstance(layer, PackedLinear):
        divisors = smooth
        return lambda x: F.linear(divide(x, divisors), values, bias)
    weight = values.reshape(layer.out_channels, -1, *layer.kernel_size)
    weight = weight.contiguous(memory_format=torch.channels_last)
    divisors = smooth.reshape(-1, 1, 1)
    options = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return lambda x: F.conv2d(divide(x, divisors), weight, bias, *options)


def _is_key_bias(mask: Tensor, query: View, key: View) -> bool:
    """Whether a mask is a number added to the scores of each key."""
    batch, heads = query.shape[:2]
    if mask.dim() != 4 or mask.dtype != torch.float32 or mask.shape[3] != key.shape[2]:
        return False
    fits = mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    return fits and mask.shape[2] == 1 and mask.stride(3) == 1


def _flat(view: View) -> View:
    """All elements of the buffer behind a view."""
    elements = view.buffer.nbytes // view.meta.element_size()
    return View(view.buffer, torch.empty(elements, dtype=view.meta.dtype, device="meta"))


def _same(x: Tensor) -> Tensor:
    return x


def _output_ids(graph: Graph) -> list[int]:
    return [leaf.id for leaf in leaves_of(graph.output) if isinstance(leaf, Ref)]


def _same_strides(meta: Tensor, kind: torch.dtype) -> Tensor:
    return torch.empty_strided(meta.shape, meta.stride(), dtype=kind, device="meta")


def _meta_of(leaf: Any) -> Any:
    if isinstance(leaf, View):
        return leaf.meta
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _owner(result: Any, views: list[View]) -> View | None:
    """The view whose memory a result of torch shares."""
    if not isinstance(result, Tensor):
        return None
    return next((view for view in views if torch._C._is_alias_of(result, view.meta)), None)


def _changes_in_place(target: Callable | str) -> bool:
    name = "" if isinstance(target, str) else _name_of(target)
    dunder = name.startswith("__")
    return name == "_set_item" or (name.endswith("_") and not dunder)


def _is_identity(node: Node) -> bool:
    """Whether a call returned what it was given, as a dropout does that is switched off."""
    returns_input = set(node.gives()) <= set(node.uses())
    return returns_input and not isinstance(node.target, str) and not _changes_in_place(node.target)


def _name_of(target: Callable | str) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _bound(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _pair(size: Any) -> tuple[int, int]:
    vertical, horizontal = size
    return vertical, horizontal


def _is_power_of_two(number: float) -> bool:
    return number != 0 and math.frexp(abs(number))[0] == 0.5


def _activation_of(node: Node) -> int | None:
    if node.target is F.silu:
        return None if node.kwargs.get("inplace") else native_library.SILU
    if node.kwargs.get("approximate") == "tanh":
        return native_library.GELU_TANH
    return native_library.GELU_ERF


def _layout(meta: Tensor) -> Layout | None:
    return pixels_of(meta) if meta.dim() == 4 else tokens_of(meta)


def _channels_layout(meta: Tensor) -> Layout | None:
    """The pixels of an image batch, of tokens, or of a sequence (B, C, L) with channels inside."""
    if meta.dim() == 3 and meta.shape[1] > 1 and meta.stride(1) == 1 and meta.stride(2) != 1:
        return tokens_of(meta.transpose(1, 2))
    return _layout(meta)


def _dense_like(meta: Tensor) -> Tensor:
    """Without gaps, in the order of the memory of `meta`."""
    if meta.dim() == 4:
        batch, channels, height, width = meta.shape
        return pixel_shape(batch, height, width, channels)
    if meta.dim() == 3 and _channels_layout(meta) != _layout(meta):
        batch, channels, length = meta.shape
        strides = (channels * length, 1, channels)
        return torch.empty_strided(meta.shape, strides, device="meta")
    return torch.empty(meta.shape, device="meta")


def is_dense(meta: Tensor) -> bool:
    axes = sorted(zip(meta.stride(), meta.shape, strict=True))
    expected = 1
    for stride, size in axes:
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _same_order(one: View, other: View) -> bool:
    """Whether two dense views have their values in the same order in memory."""
    if one.shape == other.shape:
        pairs = zip(one.shape, one.meta.stride(), other.meta.stride(), strict=True)
        return all(size == 1 or first == second for size, first, second in pairs)
    return is_dense(one.meta) and is_dense(other.meta) and one.meta.numel() == other.meta.numel()


def _vector(other: Tensor, like: Tensor) -> Tensor | None:
    """A vector of each sample that broadcasts over `like`, as (batch or 1, channels)."""
    if other.dtype != torch.float32:
        return None
    channel = 1 if like.dim() == 4 else like.dim() - 1
    shape = (1,) * (like.dim() - other.dim()) + tuple(other.shape)
    aligned = other.reshape(shape) if other.dim() < like.dim() else other
    if aligned.dim() != like.dim() or aligned.shape[channel] != like.shape[channel]:
        return None
    inner = [size for axis, size in enumerate(aligned.shape) if axis not in (0, channel)]
    if any(size != 1 for size in inner) or aligned.shape[0] not in (1, like.shape[0]):
        return None
    if aligned.shape[channel] > 1 and aligned.stride(channel) != 1:
        return None
    if like.dim() == 2 and aligned.shape[0] == like.shape[0] and like.shape[0] > 1:
        return None
    strides = (aligned.stride(0), 1)
    return torch.as_strided(
        other, (aligned.shape[0], aligned.shape[channel]), strides, other.storage_offset()
    )


def code_layout(
    batch: int, height: int, width: int, channels: int, upsample: int, padding: Padding
) -> Layout:
    """Where the codes of an image lie, after upsampling and padding; channels are whole dwords."""
    tall = height * upsample + padding.above + padding.below
    wide = width * upsample + padding.left + padding.right
    padded = -(-channels // 4) * 4
    return Layout(batch, tall, wide, padded, tall * wide * padded, wide * padded, padded)


def _code_view(layout: Layout) -> View:
    size = layout.batch * layout.sample
    return new_view(torch.empty(size, dtype=torch.uint8, device="meta"))


def _inner_size(output: Output, chain: Chain) -> tuple[int, int]:
    """Height and width of the pixels that a stream reads for this output."""
    padding = output.padding
    height = (output.layout.height - padding.above - padding.below) // output.upsample
    width = (output.layout.width - padding.left - padding.right) // output.upsample
    return height, width
