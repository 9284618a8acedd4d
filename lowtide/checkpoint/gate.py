"""The gate before diffusers reads a folder of ours: what is wrong with it is one sentence.

diffusers reads configurations, the index and other components before any quantizer is asked. So
`from_pretrained` of its pipelines, models and schedulers is wrapped: folders that lowtide wrote,
and packed models, are checked first. Every other folder, and every hub id, passes as it is. A
folder that a writer replaces while it is read is read again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import wrapt
from torch import nn

from lowtide.checkpoint.config_checks import check_config, check_index, check_scheduler, shards_in
from lowtide.checkpoint.file_format import (
    PLAN,
    check_unaltered,
    verified,
    verify_plan,
)
from lowtide.checkpoint.folder_locks import reading_in
from lowtide.checkpoint.headers import METADATA, header_of
from lowtide.checkpoint.manifest import MANIFEST
from lowtide.errors import BadInput

CONFIG = "config.json"
OURS = b'"quant_method": "lowtide'
MOST_READS = 100  # of a folder that is replaced again and again
# A network has parameters by the tensors in its file; caches and blanks stand for some layers.
MORE_PARAMETERS = 4
FEW_PARAMETERS = 1000
# Whether a folder is being read, so that what is inside it needs no lock of its own.
_reading: ContextVar[bool] = ContextVar("reading", default=False)
# What says nothing of the folder.
_NOT_OF_THE_FOLDER = (torch.OutOfMemoryError, MemoryError, ImportError)


def wrap_pipelines(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "DiffusionPipeline.from_pretrained", _pipeline)


def wrap_models(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "ModelMixin.from_pretrained", _model)


def wrap_schedulers(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "SchedulerMixin.from_pretrained", _scheduler)


def _pipeline(wrapped: Callable[..., Any], cls: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    home = _local(args, kwargs)
    if home is None or not (home / MANIFEST).is_file():
        return wrapped(*args, **kwargs)

    def load() -> Any:
        # What diffusers loads as a packed model has a gate of its own; a text encoder has none.
        packed = [part.name for part in home.iterdir() if _is_ours(part) and _is_sealed(part)]
        check_unaltered(home, without=packed)
        check_index(home)
        return wrapped(*args, **kwargs)

    return _steadily(home, "model_index.json", load)


def _model(wrapped: Callable[..., Any], cls: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    folder = _local(args, kwargs)
    if folder is None or not (_is_ours(folder) or _is_part_of_ours(folder)):
        return wrapped(*args, **kwargs)

    def load() -> Any:
        _check_seals(folder)
        _check_part(folder)
        check_config(folder / CONFIG, cls)
        most = _most_parameters(folder)
        with _few_parameters(folder / CONFIG, most):
            return wrapped(*args, **kwargs)

    return _steadily(folder, CONFIG, load)


def _scheduler(wrapped: Callable[..., Any], cls: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    folder = _local(args, kwargs)
    if folder is None or not _is_part_of_ours(folder):
        return wrapped(*args, **kwargs)

    def load() -> Any:
        _check_part(folder)
        check_scheduler(folder)
        return wrapped(*args, **kwargs)

    return _steadily(folder, "scheduler_config.json", load)


def _local(args: tuple, kwargs: dict[str, Any]) -> Path | None:
    """The folder on this machine that is loaded from, with its subfolder."""
    name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if not isinstance(name, str | Path):
        return None
    folder = Path(name) / (kwargs.get("subfolder") or "")
    return folder if folder.is_dir() else None


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a packed model, as far as it can be read."""
    try:
        return (folder / MANIFEST).is_file() or OURS in (folder / CONFIG).read_bytes()
    except OSError:
        return False


def _is_part_of_ours(folder: Path) -> bool:
    """Whether a folder is a part of a pipeline that lowtide wrote."""
    return (folder.absolute().parent / MANIFEST).is_file()


def _is_sealed(folder: Path) -> bool:
    """Whether a folder holds packed weights, whose headers say what belongs to them."""
    try:
        return any(PLAN in header_of(path)[1].get(METADATA, {}) for path in shards_in(folder))
    except BadInput:
        return False


def _check_seals(folder: Path) -> None:
    """The plan of packed weights is the one that was saved, and config.json that of the seal."""
    for path in shards_in(folder):
        header = header_of(path)[1].get(METADATA, {})
        if PLAN in header:
            verify_plan(header, path)


def _check_part(folder: Path) -> None:
    """The files of this folder are as they were written, as its own list or its pipeline's says.

    A configuration that a seal knows may have other fields than those of the network.
    """
    sealed = (CONFIG,) if _is_sealed(folder) else ()
    if (folder / MANIFEST).is_file():
        check_unaltered(folder, without=sealed)
    elif _is_part_of_ours(folder):
        home = folder.absolute().parent
        names = [f"{folder.name}/{name}" for name in sealed]
        check_unaltered(home, within=folder.name, without=names)


def _steadily(folder: Path, says: str, load: Callable[[], Any]) -> Any:
    """What `load` gives, while no writer replaces the folder.

    Where folders cannot be locked, it is read again if it was replaced. Whatever is wrong with it
    is one sentence. says: the file that an error is blamed on where the checks found nothing.
    """
    for _ in range(MOST_READS):
        before = _identity(folder)
        try:
            with _kept_in_place(folder):
                result = load()
        except _NOT_OF_THE_FOLDER:
            raise
        except Exception as error:
            if _identity(folder) == before:
                raise _one_sentence(folder, says, error) from error
            continue
        if _identity(folder) == before:
            return result
    raise BadInput(
        f"found {folder} replaced whenever it was read",
        "a moment without a writer",
        "load it again when nothing writes it",
    )


@contextmanager
def _kept_in_place(folder: Path) -> Iterator[None]:
    """Within the context, a writer of the folder, or of the pipeline that it is in, waits."""
    home = folder.absolute()
    if not (home / MANIFEST).is_file() and _is_part_of_ours(home):
        home = home.parent
    if _reading.get():
        yield
        return
    token = _reading.set(True)
    try:
        with reading_in(home.parent):
            yield
    finally:
        _reading.reset(token)


def _identity(folder: Path) -> tuple[int, ...] | None:
    """What tells a folder from the one that takes its place; None while there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_ctime_ns)


def _one_sentence(folder: Path, says: str, error: Exception) -> BadInput:
    if isinstance(error, BadInput):
        return error
    if isinstance(error.__cause__, BadInput):
        return error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return BadInput(
        f"found that {folder} cannot be loaded as its {says} says "
        f"({type(error).__name__}: {lines[0][:200]})",
        "the files that were saved, and options that diffusers knows",
        "check the options, or copy the folder again",
    )


def _most_parameters(folder: Path) -> int | None:
    """How many parameters a network of this folder can have; None if no file says."""
    if verified() == "off":
        return None
    count = 0
    for path in shards_in(folder):
        header = header_of(path)[1]
        if PLAN not in header.get(METADATA, {}):
            return None
        count += len(header)
    return MORE_PARAMETERS * count + FEW_PARAMETERS if count else None


@contextmanager
def _few_parameters(config: Path, most: int | None) -> Iterator[None]:
    """Within the context, a network of more parameters is an error as soon as it has them."""
    if most is None:
        yield
        return
    count = 0

    def counting(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise BadInput(
                f"found a network of more than {most:,} parameters in {config}",
                "the network of the tensors beside it",
                "copy or download the folder again",
            )

    hook = cast(Any, torch.nn.modules.module).register_module_parameter_registration_hook(counting)
    try:
        yield
    finally:
        hook.remove()
