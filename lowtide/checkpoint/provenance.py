"""lowtide.json: where a checkpoint comes from: the command, the float model, the method, the settings, and what it cost."""

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide.errors import BadInput

NAME, VERSION = "lowtide.json", 1
# How a program started from the command line may be called.
OURS = ("lowtide", "__main__")


@dataclass(frozen=True)
class Record:
    """The record of one run. `source` is absolute where it is a folder; `fingerprint` is a hash of the float weights."""

    command: str
    source: str
    fingerprint: str
    method: str
    settings: dict[str, Any]
    without: tuple[str, ...]
    report: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Beside the weights, whole or not at all."""
        fresh = folder / f".{NAME}.new"
        fresh.write_text(
            json.dumps({"version": VERSION} | asdict(self), indent=1, default=str) + "\n"
        )
        fresh.replace(folder / NAME)


def read(folder: Path | None) -> Record | None:
    """The record of a checkpoint, if it has one."""
    path = folder / NAME if folder else None
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        version = found.pop("version")
        if version != VERSION:
            raise BadInput(
                f"found {NAME} of version {version}",
                f"version {VERSION}",
                "use the lowtide that wrote it",
            )
        return Record(**found | {"without": tuple(found["without"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"found {path} unreadable",
            "the record that lowtide wrote",
            "delete it, or quantize again",
        ) from error


def command() -> str:
    """The command line that is running."""
    program, *arguments = sys.argv or [""]
    if Path(program).stem in OURS:
        return shlex.join(["lowtide", *arguments])
    return f"{Path(program).name or 'Python'}, through lowtide's Python interface"
