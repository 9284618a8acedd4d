"""FinishedWork: the finished parts of one run on disk, which the same command takes up again.

    OUT.run/DIGEST/conditions.json           what the run began with
    OUT.run/DIGEST/engines.json              what runs each product of a packed model
    OUT.run/DIGEST/units/NAME.safetensors    a part, see records.py

The digest is of all that the result depends on, so another request finds nothing. OUT.run is
removed when the result stands at OUT.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from lowtide import runtime
from lowtide.distributed.world import World
from lowtide.errors import BadInput
from lowtide.machine.room import complain
from lowtide.stages import conditions
from lowtide.stages.conditions import Conditions, keep, kept_to, write_json
from lowtide.stages.records import read_record, write_record

ENGINES = "engines.json"
UNITS = "units"
_PATTERNS = (conditions.FILE, ENGINES, "*.new", f"{UNITS}/*.safetensors", f"{UNITS}/*.new")


@dataclass(frozen=True)
class FinishedWork:
    """The finished parts of one run.

    conditions: what the run began with; they are written before the first part.
    engines: the kernel of each product in words, by its shape. A race chooses it, and sums of
        another engine differ in the last digits, so a resumed run keeps to it.
    """

    folder: Path
    conditions: Conditions
    say: Callable[[str], object]
    engines: dict[str, str] = field(default_factory=dict)

    def announce(self) -> None:
        """Say that the run goes on, if it does."""
        if count := len(list((self.folder / UNITS).glob("*.safetensors"))):
            self.say(f"going on where an earlier run stopped, with {count} finished parts")

    def recorded(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a finished part; None if there is none, or it is damaged."""
        return read_record(self._path(name), self.say)

    def record(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a finished part."""
        keep(self.folder, self.conditions)
        if self.engines and self.engines != _engines_in(self.folder):
            write_json(self.folder / ENGINES, self.engines)
        write_record(self._path(name), tensors)

    def discard(self, name: str) -> None:
        """Remove a part that is not needed any more."""
        self._path(name).unlink(missing_ok=True)

    def keep_engines(self, models: Sequence[nn.Module]) -> None:
        """Run packed models on the engines of the interrupted run; note those of new shapes."""
        self.engines.update(_engines_in(self.folder))
        for model in models:
            runtime.keep_engines(model, self.engines)

    def _path(self, name: str) -> Path:
        return self.folder / UNITS / f"{name}.safetensors"


def finished_work(
    runs: Path, digest: str | None, device: torch.device, world: World
) -> FinishedWork | None:
    """What an interrupted run of this digest finished; None if nothing can be kept.

    Each rank keeps the batches that it draws.
    """
    if digest is None:
        return None
    folder = runs / digest
    begun = world.of_first(lambda: kept_to(folder, device, learns=False))
    return FinishedWork(folder, begun, complain)


def _engines_in(folder: Path) -> dict[str, str]:
    """The engines of an interrupted run; none if there is no whole file."""
    try:
        return {str(shape): str(name) for shape, name in json.loads(_text(folder)).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _text(folder: Path) -> str:
    return (folder / ENGINES).read_text()


def folder_beside(out: Path) -> Path:
    """OUT.run, where an interrupted run finds its finished parts."""
    runs = out.with_name(f"{out.name}.run")
    if runs.is_symlink() or (runs.exists() and not runs.is_dir()):
        raise BadInput(
            f"found a file at {runs}",
            "room for a folder of finished units",
            "choose another --out",
        )
    return runs


def remove_runs(folder: Path) -> None:
    """Remove what finished runs kept in FOLDER/DIGEST, and no other file."""
    for run in _runs_in(folder):
        for path in _parts_in(run):
            path.unlink()
        for emptied in (run / UNITS, run):
            with suppress(OSError):
                emptied.rmdir()
    with suppress(OSError):
        folder.rmdir()


def holds_runs_alone(folder: Path) -> bool:
    """Whether a folder holds finished parts of interrupted runs, and no file of anybody else."""
    if folder.suffix != ".run" or folder.is_symlink():
        return False
    ours = set(chain.from_iterable(map(_parts_in, _runs_in(folder))))
    return all(path in ours for path in folder.rglob("*") if not path.is_dir())


def _runs_in(folder: Path) -> list[Path]:
    return [run for run in folder.glob("*/") if re.fullmatch("[0-9a-f]{12}", run.name)]


def _parts_in(run: Path) -> set[Path]:
    return set(chain.from_iterable(map(run.glob, _PATTERNS)))
