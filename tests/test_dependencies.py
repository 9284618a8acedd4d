"""The imports of lowtide/ and the dependencies that pyproject.toml declares are the same set."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import bounds
import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "lowtide").rglob("*.py"))
# Calls that name a module in a string.
IMPORTING_CALLS = {"find_spec", "import_module", "package_folders"}
# Declared but not imported, because another dependency needs them: none at present.
NEEDED_BY_OTHERS: set[str] = set()


def normalized(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, set[str]]:
    """The distributions of each extra; those that are always installed under the name ''."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"]} | project["optional-dependencies"]
    return {name: {distribution(line) for line in lines} for name, lines in groups.items()}


def distribution(requirement: str) -> str:
    return normalized(re.match(r"[\w.-]+", requirement).group())


def modules_of(node: ast.AST) -> list[str]:
    """The modules that one statement or call imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORTING_CALLS:
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def nodes_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from nodes_at_import(child)


@cache
def installed() -> dict[str, str]:
    """The distribution that each top-level module of this environment belongs to."""
    return {module: names[0] for module, names in packages_distributions().items()}


def third_party(nodes: Iterator[ast.AST]) -> set[str]:
    """The distributions that the nodes import. A module that is missing here counts by its name."""
    names = set()
    for node in nodes:
        names.update(module.partition(".")[0] for module in modules_of(node))
    names -= sys.stdlib_module_names | {"lowtide"}
    return {normalized(installed().get(name, name)) for name in names}


def imported(path: Path) -> set[str]:
    return third_party(ast.walk(ast.parse(path.read_text())))


def imported_at_once(path: Path) -> set[str]:
    return third_party(nodes_at_import(ast.parse(path.read_text())))


def of_the_gpu(path: Path) -> bool:
    """The kernels that lowtide imports when a layer runs on a GPU."""
    return path.parent == ROOT / "lowtide" / "kernels" / "triton"


# lowtide imports the first when peft itself was imported; the second asks whether peft is there.
OF_PEFT = [ROOT / "lowtide" / "checkpoint" / name for name in ("peft_hook.py", "adapters.py")]


def given(path: Path) -> set[str]:
    """What is there whenever this module is imported, beyond what is always installed."""
    if of_the_gpu(path):
        return declared()["gpu"]
    return {"peft"} if path in OF_PEFT else set()


def test_nothing_undeclared_is_imported_with_a_module():
    allowed = declared()[""]
    undeclared = {path.name: imported_at_once(path) - (allowed | given(path)) for path in FILES}
    assert {name: extra for name, extra in undeclared.items() if extra} == {}


def test_what_a_function_imports_is_declared_or_in_the_metrics_extra():
    allowed = declared()[""] | declared()["metrics"] | declared()["gpu"]
    undeclared = {path.name: imported(path) - (allowed | given(path)) for path in FILES}
    assert {name: extra for name, extra in undeclared.items() if extra} == {}


@pytest.mark.parametrize("extra", ["", "metrics", "gpu"])
def test_everything_declared_is_imported(extra):
    everything = set().union(*map(imported, FILES))
    assert declared()[extra] - everything - NEEDED_BY_OTHERS == set()


WITHOUT_TRITON = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import lowtide
from lowtide import runtime, quantize
print([name for name in sys.modules if name.startswith("triton")])
"""


def test_lowtide_imports_no_triton_and_needs_none():
    command = [sys.executable, "-c", WITHOUT_TRITON]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines()[-1] == "[]"


def test_the_exceptions_are_declared_and_not_imported():
    everything = set().union(*map(imported, FILES))
    assert declared()[""] >= NEEDED_BY_OTHERS
    assert everything & NEEDED_BY_OTHERS == set()


def test_imports_are_seen_wherever_they_hide():
    source = """
import numpy as np
from os import path
def load():
    import scipy.stats
    return import_module("torch_fidelity")
"""
    tree = ast.parse(source)
    assert third_party(ast.walk(tree)) == {"numpy", "scipy", "torch-fidelity"}
    assert third_party(nodes_at_import(tree)) == {"numpy"}


def test_an_import_under_another_name_counts_for_its_distribution():
    assert third_party(ast.walk(ast.parse("from PIL import Image"))) == {"pillow"}


def test_torch_and_diffusers_have_a_lower_bound_to_test():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package in ("torch", "diffusers"):
        line = bounds.requirement(package, dependencies)
        assert re.fullmatch(rf"{package}==\d[\d.]*", bounds.lowest(line))
    assert bounds.lowest("torch>=2.11,<3") == "torch==2.11"
