"""lowtide.json: the command, float model, method, settings and cost behind a checkpoint."""

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.sampling.call_values import recorded

NAME = "lowtide.json"
VERSION = 1
# The names of the program when it is started from the command line.
OURS = ("lowtide", "__main__")


@dataclass(frozen=True)
class Provenance:
    """The record of one run.

    `source` is absolute where it is a folder. `fingerprint` is a hash of the float weights.
    """

    command: str
    source: str
    fingerprint: str
    method: str
    settings: dict[str, Any]
    without: tuple[str, ...]
    report: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write lowtide.json beside the weights, whole or not at all."""
        text = json.dumps({"version": VERSION} | asdict(self), indent=1, default=recorded)
        fresh = folder / f".{NAME}.new"
        fresh.write_text(text + "\n")
        fresh.replace(folder / NAME)


def read(folder: Path | None) -> Provenance | None:
    """The record of a checkpoint, if it has one."""
    path = folder / NAME if folder else None
    if path is None or not path.is_file():
        return None
    try:
        return _parsed(path.read_text())
    except BadInput:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"found {path} unreadable",
            "the record that lowtide wrote",
            "delete it, or quantize again",
        ) from error


def _parsed(text: str) -> Provenance:
    fields = json.loads(text)
    version = fields.pop("version")
    if version != VERSION:
        raise BadInput(
            f"found {NAME} of version {version}",
            f"version {VERSION}",
            "use the lowtide that wrote it",
        )
    return Provenance(**fields | {"without": tuple(fields["without"])})


def lasting_source(source: str) -> str:
    """The source under a name that is valid in any working directory; empty if it has none."""
    home = None if source.startswith("zoo:") or not source else sampling.local_folder(source)
    return str(home.resolve()) if home else source


def check_here(made_of: str, folder: str | Path, option: str) -> None:
    """Nothing that a folder names is fetched from a hub unless the user names it too."""
    if not made_of.startswith("zoo:") and not Path(made_of).exists():
        raise BadInput(
            f"found that {folder} was made of {made_of}, which is not on this machine",
            "your word before anything is fetched that a folder names",
            f"give {option} {made_of}",
        )


def lasting_file(name: str) -> str:
    """A file or folder under a name that is valid in any working directory; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def command() -> str:
    """The command line of this process."""
    program, *arguments = sys.argv or [""]
    if Path(program).stem in OURS:
        return shlex.join(["lowtide", *arguments])
    return f"{Path(program).name or 'Python'}, through lowtide's Python interface"
