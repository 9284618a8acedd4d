"""Packages that only some exports need: they are imported when an export asks for them."""

from importlib import import_module
from types import ModuleType

from lowtide.errors import BadInput


def needed(name: str) -> ModuleType:
    """The module of that name, or one sentence on how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise BadInput(
            f"found no package {package}",
            f"{package}, which this export needs",
            f"pip install {package}, or pip install 'lowtide[export]'",
        ) from error
