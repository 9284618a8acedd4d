"""A pretend accelerator for tests: real numbers and real device errors on a machine without a GPU.

A tensor on the device `pretend` has real memory: its storage is a CPU storage that dlpack gave
another device's name. A boxed fallback runs every operator on CPU tensors over the same memory, so
views, strides and freed memory are torch's own. Operators refuse tensors of two devices as CUDA
does. What CUDA has and this has not: streams, kernels of its own, random generators of its own.
"""

import ctypes
from collections.abc import Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from pretend_hooks import NAME, Guard, Held, Hooks, Module, present
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["NAME", "Held", "is_pretend", "on_cpu", "on_pretend", "present"]

CPU = torch.device("cpu")
# dlpack's numbers of devices: the CPU, and "another device", which torch takes for PrivateUse1.
DLPACK_CPU = 1
DLPACK_OTHER = 12
# Operators that take a tensor without axes from the CPU as a number, besides the pointwise ones.
TAKE_NUMBERS = {"fill_", "index_put", "index_put_", "_index_put_impl_", "masked_fill_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}

# torch removes these operators when the library object is deleted, so it is kept here.
_libraries: list[torch.library.Library] = []


# --- tensors of the device, and CPU tensors over the same memory ---


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _relabelled(tensor: Tensor, kind: int, index: int) -> Tensor:
    """The same memory as a tensor of another device. It lives as long as either of the two."""
    capsule = torch._C._to_dlpack(tensor)
    # A DLTensor starts with its data pointer and its device: two int32, the kind and the index.
    device = _pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    (ctypes.c_int32 * 2).from_address(device)[:] = [kind, index]
    return torch._C._from_dlpack(capsule)


def on_pretend(tensor: Tensor, index: int = 0) -> Tensor:
    """The tensor of the device over this CPU tensor's memory, with its strides and offset."""
    storage = tensor.untyped_storage()
    Held.count(storage)
    whole = torch.empty(0, dtype=tensor.dtype)
    whole.set_(storage, 0, (storage.nbytes() // tensor.element_size(),), (1,))
    flat = _relabelled(whole, DLPACK_OTHER, index)
    flat.untyped_storage().on_cpu = storage
    return _view(flat, tensor)


def is_pretend(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def on_cpu(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a tensor of the device."""
    twin = torch.empty(0, dtype=tensor.dtype)
    storage = tensor.untyped_storage().on_cpu
    return twin.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _view(tensor: Tensor, like: Tensor) -> Tensor:
    """A view of the device's tensor: shape, strides and offset of a CPU view of the same memory."""
    offset = like.storage_offset() - tensor.storage_offset()
    return torch.ops.inductor._reinterpret_tensor(tensor, like.shape, like.stride(), offset)


# --- operators ---


class Signature(NamedTuple):
    """What is declared of an operator.

    arguments: their names. written: those that it writes to. plain: those that may be numbers.
    """

    arguments: tuple[str, ...]
    written: frozenset[str]
    tensors: frozenset[str]
    takes_numbers: bool


@cache
def signature_of(op: Any) -> Signature:
    declared = op._schema.arguments
    takes_numbers = op.overloadpacket.__name__ in TAKE_NUMBERS
    return Signature(
        arguments=tuple(each.name for each in declared),
        written=frozenset(each.name for each in declared if each.is_write),
        tensors=frozenset(each.name for each in declared if str(each.type) == "Tensor"),
        takes_numbers=takes_numbers or torch.Tag.pointwise in op.tags,
    )


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator: run it on CPU tensors over the same memory."""
    signature = signature_of(op)
    named = [*zip(signature.arguments, args, strict=False), *kwargs.items()]
    leaves: list[tuple[str, Any]] = []
    # torch hands a number in a tensor's place as a number; another overload takes that.
    numbers = False
    for name, value in named:
        if isinstance(value, int | float):
            numbers = numbers or name in signature.tensors
        elif value is not None:
            leaves += [(name, leaf) for leaf in _leaves(value)]
    index = _checked_index(op, named, leaves)
    pairs = [(name, leaf, on_cpu(leaf)) for name, leaf in leaves if is_pretend(leaf)]
    twins = {id(leaf): twin for _, leaf, twin in pairs}
    inputs = [_inside(value, twins) for value in args]
    options = {name: _inside(value, twins) for name, value in kwargs.items()}
    results = (op.overloadpacket if numbers else op)(*inputs, **options)
    same: dict[int, Tensor] = {}
    if signature.written:
        for name, leaf, twin in pairs:
            if name in signature.written:
                _follow(leaf, twin)
                same[id(twin)] = leaf
    asked = kwargs.get("device")
    if asked is not None and asked.type != NAME:
        return results
    owners = {twin.untyped_storage()._cdata: leaf for _, leaf, twin in pairs}
    return _outside(results, same, owners, index)


def _leaves(value: Any) -> Iterable[Any]:
    """The tensors and generators in an argument."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, list | tuple):
        return [leaf for leaf in value if isinstance(leaf, Tensor)]
    return (value,) if isinstance(value, torch.Generator) else ()


def _inside(value: Any, twins: dict[int, Tensor]) -> Any:
    """An argument for the CPU."""
    if isinstance(value, Tensor):
        return twins.get(id(value), value)
    if isinstance(value, list | tuple):
        return [_inside(each, twins) for each in value]
    if isinstance(value, torch.device) and value.type == NAME:
        return CPU
    if isinstance(value, torch.UntypedStorage) and value.device.type == NAME:
        return value.on_cpu
    return value


def _outside(result: Any, same: dict[int, Tensor], owners: dict[int, Tensor], index: int) -> Any:
    """A result for the caller: the tensor that was written, a view of an argument, or a new one."""
    if isinstance(result, tuple | list):
        return type(result)(_outside(each, same, owners, index) for each in result)
    if not isinstance(result, Tensor):
        return result
    if id(result) in same:
        return same[id(result)]
    owner = owners.get(result.untyped_storage()._cdata)
    if owner is None or owner.dtype != result.dtype:
        return on_pretend(result, index)
    return _view(owner, result)


def _follow(leaf: Tensor, twin: Tensor) -> None:
    """Give a tensor the shape and memory that an operator in place gave its CPU twin."""
    if twin.untyped_storage()._cdata != leaf.untyped_storage().on_cpu._cdata:
        leaf.data = on_pretend(twin, leaf.device.index)
    elif (twin.shape, twin.stride()) != (leaf.shape, leaf.stride()):
        leaf.data = _view(leaf, twin)


# --- errors, as CUDA gives them ---


def _checked_index(op: Any, named: list[tuple[str, Any]], leaves: list[tuple[str, Any]]) -> int:
    """The index of the card that an operator runs on, if all its tensors lie there."""
    signature = signature_of(op)
    indexing = op.overloadpacket.__name__ in INDEXING
    if indexing:
        _check_indices(named[0][1].device, named[1][1])
    index: int | None = None
    stray = ""
    for name, leaf in leaves:
        device = leaf.device
        if isinstance(leaf, torch.Generator):
            _check_generator(leaf)
        elif indexing and name == "indices":
            continue
        elif device.type == NAME and index in (None, device.index):
            index = device.index
        elif not (signature.takes_numbers and device == CPU and leaf.dim() == 0):
            stray = stray or f"{name} is on {device}"
    if stray:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got {stray}, different from "
            f"other tensors on {NAME}:{index or 0} (when checking argument in {op})"
        )
    asked = [value for name, value in named if name == "device" and value is not None]
    return next((device.index or 0 for device in asked), index or 0)


def _check_indices(device: torch.device, indices: Any) -> None:
    """Indices lie on the CPU or beside what they index."""
    for leaf in _leaves(indices):
        if leaf.device not in (device, CPU):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor "
                f"({device})"
            )


def _check_generator(generator: torch.Generator) -> None:
    if generator.device.type != NAME:
        raise RuntimeError(
            f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'"
        )


# --- registration ---


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What `copy_` and every move between devices come to."""
    pair = [on_cpu(each) if is_pretend(each) else each for each in (source, target)]
    pair[1].copy_(pair[0])
    return target


class _GroupNorm(torch.autograd.Function):
    """A group norm whose tensors keep the order of their axes in memory.

    On every device but the CPU torch makes them contiguous, and their sums are in another order.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> Tensor:
        ordered = x.contiguous(memory_format=suggest_memory_format(x))
        ctx.sizes = (len(x), x.shape[1], x[0, 0].numel(), groups)
        y, mean, deviation = torch.native_group_norm(ordered, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(ordered, mean, deviation, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0]
        ordered = grad.contiguous(memory_format=suggest_memory_format(x))
        needed = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.native_group_norm_backward(
            ordered, *ctx.saved_tensors, *ctx.sizes, needed
        )
        return (*grads, None, None)


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _GroupNorm.apply(x, weight, bias, groups, eps)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention by the kernel that the CPU would choose, which torch asks no such device for."""
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
    aten = torch.ops.aten
    if not _is_flash(query, key, value, options):
        return aten._scaled_dot_product_attention_math(query, key, value, **options)[0]
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        options["attn_mask"] = hidden
    options.pop("enable_gqa", None)
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, **options)[0]


def _is_flash(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether the CPU would run these tensors by its flash kernel."""
    tensors = [on_cpu(each.detach()) for each in (query, key, value)]
    twins = {
        name: on_cpu(each.detach()) if is_pretend(each) else each for name, each in options.items()
    }
    choice = torch._fused_sdp_choice(*tensors, **twins)
    flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    return choice == flash.value and not options.get("enable_gqa")


def _cloned(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy of a storage of the device."""
    copied = torch.empty(0, dtype=torch.uint8).set_(storage.on_cpu.clone())
    return on_pretend(copied, storage.device.index).untyped_storage()


def _decomposed() -> list[str]:
    """Operators that would be made of smaller ones here, and are one kernel on the CPU."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    composite = ("ExplicitAutograd", "ImplicitAutograd", "ExplicitAutogradNonFunctional")
    apart = [
        name
        for name in names
        if has(name, "CPU") and any(has(name, f"Composite{key}") for key in composite)
    ]
    return ["aten::convolution", "aten::convolution_backward", *apart]


def _install() -> None:
    """Register the device with torch, for the whole process."""
    _setup_privateuseone_for_python_backend(NAME, Module(), Hooks(), Guard())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(run, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in _decomposed():
        packet, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(name, partial(run, op), "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        aten.impl("group_norm", _group_norm, key)
        aten.impl("scaled_dot_product_attention", _attention, key)
    _libraries.extend([everything, aten])
    clone = torch.UntypedStorage.clone

    def cloned(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        # torch allocates the copy in C++, where this device has no allocator.
        return _cloned(storage) if storage.device.type == NAME else clone(storage)

    torch.UntypedStorage.clone = cloned


# torch counts the devices at the first backward pass of a process, so this comes with the import.
_install()
