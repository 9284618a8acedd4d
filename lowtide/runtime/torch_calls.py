"""What can be told from a recorded call alone: its arguments by name, and whether it writes."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lowtide.models.trace import Node
from lowtide.runtime.memory import View


def name_of(target: Callable | str) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def arguments_of(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def changes_in_place(node: Node) -> bool:
    """Whether a call writes to its first argument: `x.add_(1)`, `x[0] = 1`, `F.relu(x, True)`."""
    if isinstance(node.target, str):
        return False
    name = name_of(node.target)
    named_so = name.endswith("_") and not name.startswith("__")
    return named_so or name == "_set_item" or _is_asked_to(node.target, node)


def _is_asked_to(function: Callable, node: Node) -> bool:
    """Whether the argument `inplace` is given and true."""
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a function in C, which has no such argument
        return False
    return bool(bound.arguments.get("inplace"))


def returns_its_input(node: Node) -> bool:
    """Whether a call of torch does nothing, as a dropout that is switched off."""
    if isinstance(node.target, str) or changes_in_place(node):
        return False
    return set(node.gives()) <= set(node.uses())


def owner_of(result: object, views: list[View]) -> View | None:
    """The view whose memory a result of torch on the meta device shares."""
    if not isinstance(result, Tensor):
        return None
    storage = result.untyped_storage()._cdata
    return next((view for view in views if view.meta.untyped_storage()._cdata == storage), None)
