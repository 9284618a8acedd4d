"""Small trained diffusion models: `zoo:NAME` stands wherever a model is expected.

The small models ship in this package. The larger ones lie in the folder `zoo/` of the repository,
beside the scripts that train all of them. The largest is no part of the repository: it is found in
`shared/data/zoo-NAME` beside it, or where training puts it.
"""

from pathlib import Path

from lowtide.errors import BadInput

PACKAGE = Path(__file__).parent
REPOSITORY = PACKAGE.parent.parent / "zoo"
SHIPPED = ("cifar10-small", "digits", "digits-cond")
REPOSITORY_ONLY = ("dit", "emoji", "emoji-vae")
BESIDE = REPOSITORY.parent.parent / "shared" / "data"
BESIDE_ONLY = ("cifar10",)


def folders() -> dict[str, Path]:
    """The folder of every zoo model that exists on this machine."""
    marks = [*REPOSITORY.glob("*/config.json"), *REPOSITORY.glob("*/model_index.json")]
    marks += [*PACKAGE.glob("*/config.json"), *PACKAGE.glob("*/model_index.json")]
    found = {name: BESIDE / f"zoo-{name}" for name in BESIDE_ONLY}
    beside = {name: path for name, path in found.items() if (path / "model_index.json").exists()}
    return beside | {mark.parent.name: mark.parent for mark in marks}


def names() -> list[str]:
    """The models that are whole pipelines: those that `zoo:NAME` can name."""
    return sorted(name for name, path in folders().items() if (path / "model_index.json").exists())


def folder(name: str) -> Path:
    """The folder of one zoo model, in the ordinary layout of diffusers."""
    path = folders().get(name)
    if path is None:
        raise _missing(name)
    return path


def _missing(name: str) -> BadInput:
    """The error that says where a model that is not installed can be had."""
    if name in REPOSITORY_ONLY:
        return BadInput(
            f"found no zoo:{name} in this installation",
            f"the folder zoo/{name} of the lowtide repository, since the wheel must stay small",
            f"clone the repository and pass the path of its zoo/{name} as the model",
        )
    if name in BESIDE_ONLY:
        return BadInput(
            f"found no weights of zoo:{name}, which are too large for the repository",
            f"the folder shared/data/zoo-{name} beside the repository, or zoo/{name} in it",
            f"run `python zoo/train.py {name}` in a clone on a machine with a GPU, "
            "or pass the path of its folder as the model",
        )
    expected = f"one of {', '.join(names())}"
    return BadInput(f"found no zoo model called {name!r}", expected, "write zoo:NAME")
