"""Small trained diffusion models: `zoo:digits` wherever a model is asked for. Small ones ship in the package, others lie in
`zoo/` of the repository."""

from pathlib import Path

from lowtide.errors import BadInput

INSIDE = Path(__file__).parent
BESIDE = INSIDE.parent.parent / "zoo"
SHIPPED = ("digits", "digits-cond", "cifar10-small")


def homes() -> dict[str, Path]:
    """Every zoo model that is really here, and where."""
    marks = [
        path for place in (BESIDE, INSIDE) for mark in ("model_index.json", "config.json") for path in place.glob(f"*/{mark}")
    ]
    return {path.parent.name: path.parent for path in marks}


def names() -> list[str]:
    """Those that are pipelines, for a user to ask for."""
    return sorted(name for name, home in homes().items() if (home / "model_index.json").exists())


def folder(name: str) -> Path:
    """Where a zoo model lies, as an ordinary diffusers folder."""
    if name not in homes():
        raise BadInput(f"found no zoo model called {name!r}", f"one of {', '.join(names())}", "write zoo:NAME")
    return homes()[name]


def home(name: str) -> Path:
    """Where training puts a model."""
    return (INSIDE if name in SHIPPED else BESIDE) / name
