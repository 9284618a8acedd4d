"""What can be told from a recorded call alone: its name, its arguments, and what it gives."""

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


def returns_its_input(node: Node) -> bool:
    """Whether a call of torch does nothing, as a dropout that is switched off."""
    if isinstance(node.target, str) or node.writes:
        return False
    return set(node.gives()) <= set(node.uses())


def owner_of(result: object, views: list[View]) -> View | None:
    """The view whose memory a result of torch on the meta device shares."""
    if not isinstance(result, Tensor):
        return None
    storage = result.untyped_storage()._cdata
    return next((view for view in views if view.meta.untyped_storage()._cdata == storage), None)
