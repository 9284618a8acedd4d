"""Print a requirement of pyproject.toml for pip: `python tests/bounds.py lowest torch`.

`lowest` pins the package to its lower bound. `newest` prints the requirement as it is declared, of
which pip installs the newest version.
"""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def requirement(package: str, lines: list[str]) -> str:
    """The declared requirement, such as `torch>=2.11`."""
    [line] = [line for line in lines if re.match(r"[\w.-]+", line).group() == package]
    return line


def lowest(line: str) -> str:
    """`torch>=2.11,<3` -> `torch==2.11`."""
    name, version = re.match(r"([\w.-]+?)\s*>=\s*([\w.]+)", line).groups()
    return f"{name}=={version}"


def main() -> None:
    bound, package = sys.argv[1:]
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    line = requirement(package, declared)
    print(lowest(line) if bound == "lowest" else line)


if __name__ == "__main__":
    main()
