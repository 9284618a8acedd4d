"""Small trained diffusion models that ship with the package: `zoo:digits` wherever a model is asked for."""

from pathlib import Path

from lowtide.errors import BadInput

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The zoo models that are really here, not merely planned."""
    return sorted(path.parent.name for path in FOLDER.glob("*/model_index.json"))


def folder(name: str) -> Path:
    """Where a zoo model lies, as an ordinary diffusers folder."""
    if name not in names():
        raise BadInput(f"found no zoo model called {name!r}", f"one of {', '.join(names())}", "write zoo:NAME")
    return FOLDER / name
