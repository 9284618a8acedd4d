"""Rules that a machine can check: sizes, names, circles, first lines, start-up time."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "lowtide").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FORBIDDEN = {"utils", "helpers", "common", "misc", "manager", "handler", "wrapper"}
# typer reads a command's options from its parameters, so a command has as many as it has options.
MANY_PARAMETERS = {"commands.py", "benching.py"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        node
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def length(node: ast.stmt) -> int:
    return node.end_lineno - node.lineno + 1


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    taken = function.args
    named = [
        *taken.posonlyargs,
        *taken.args,
        *taken.kwonlyargs,
        *filter(None, (taken.vararg, taken.kwarg)),
    ]
    return [argument.arg for argument in named if argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", FILES + TESTS, ids=short)
def test_file_is_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= (
        300 if path.parent == ROOT / "lowtide" / "methods" else 400
    )


@pytest.mark.parametrize("path", FILES + TESTS, ids=short)
def test_first_line_states_the_purpose(path: Path) -> None:
    text = path.read_text()
    assert text.startswith('"""') and len(text.splitlines()[0].strip('"').strip()) > 10


def test_median_function_is_short() -> None:
    lengths = [length(function) for path in FILES for function in functions(path)]
    assert len(lengths) > 100
    assert statistics.median(lengths) < 10


def test_functions_take_few_parameters() -> None:
    counted = [
        (len(parameters(function)), function.name, short(path))
        for path in FILES
        if path.name not in MANY_PARAMETERS
        for function in functions(path)
        if not runs_on_a_device(function)
    ]
    assert [one for one in counted if one[0] > 7] == []


def runs_on_a_device(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton's kernels take pointers, strides and sizes one by one, as a C function would."""
    return "triton.jit" in map(ast.unparse, function.decorator_list)


def test_names_say_something() -> None:
    parts = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert parts & FORBIDDEN == set()


def repeated(places: Iterator[tuple[str, Path]]) -> dict[str, list[str]]:
    """Names that stand in more than one place."""
    by_name: dict[str, list[str]] = {}
    for name, path in places:
        by_name.setdefault(name, []).append(short(path))
    return {name: paths for name, paths in by_name.items() if len(paths) > 1}


def test_no_two_modules_share_a_name() -> None:
    names = ((path.parent if path.stem == "__init__" else path).stem for path in FILES)
    assert repeated(zip(names, FILES, strict=True)) == {}


def test_no_two_classes_share_a_name() -> None:
    assert repeated(chain.from_iterable(map(public_classes, FILES))) == {}


def public_classes(path: Path) -> Iterator[tuple[str, Path]]:
    """All but the mirrors of C structures, which have the names of the C header."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not mirrors_c(node):
            yield node.name, path


def mirrors_c(node: ast.ClassDef) -> bool:
    return "ctypes.Structure" in map(ast.unparse, node.bases)


def test_no_module_bears_the_name_of_a_function_of_the_face() -> None:
    functions = {
        "quantize",
        "load",
        "save",
        "evaluate",
        "compare",
        "plan",
        "reschedule",
        "images",
        "recalibrate",
    }
    at_the_top = {path.stem for path in (ROOT / "lowtide").iterdir()}
    assert at_the_top & functions == set()


def test_few_modules_lie_loose_at_the_top() -> None:
    loose = {path.stem for path in FILES if path.parent == ROOT / "lowtide"}
    assert loose == {"__init__", "__main__", "errors", "quantization", "settings", "validation"}


def packed_assignments(path: Path) -> list[int]:
    """Lines that assign several values of a written-out tuple at once; a swap is one assignment."""
    pairs = [
        (node, node.targets[0])
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
    ]
    tuples = [(node, target) for node, target in pairs if isinstance(target, ast.Tuple)]
    return [node.lineno for node, target in tuples if not is_swap(node, target)]


def is_swap(node: ast.Assign, target: ast.Tuple) -> bool:
    values = node.value.elts if isinstance(node.value, ast.Tuple) else []
    return {ast.unparse(each) for each in target.elts} == {ast.unparse(each) for each in values}


def nested_comprehensions(path: Path) -> list[int]:
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    return [node.lineno for node in nodes if len(node.generators) > 1]


@pytest.mark.parametrize("path", FILES, ids=short)
def test_one_assignment_a_line_and_one_for_a_comprehension(path: Path) -> None:
    assert packed_assignments(path) == []
    assert nested_comprehensions(path) == []


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def named(node: ast.AST) -> Iterator[str]:
    """The modules an import statement names; `from a import b` is a.b where that is a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"a relative import in line {node.lineno}"
        whole = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from (name if name in MODULES else node.module for name in whole)


def type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run, inside functions too: an import hidden there is no way round a circle."""
    for child in ast.iter_child_nodes(node):
        if not type_checking(child):
            yield child
            yield from running(child)


def imports(path: Path) -> set[str]:
    return {name for node in running(tree(path)) for name in named(node)}


def reachable(start: str, arrows: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(arrows[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += arrows[name]
    return seen


def test_no_import_circle() -> None:
    arrows = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}
    assert sum(map(len, arrows.values())) > 50
    assert [name for name in arrows if name in reachable(name, arrows)] == []


def test_reachable_sees_a_circle() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert [name for name in arrows if name in reachable(name, arrows)] == ["a", "b", "c"]


def test_one_room_knows_torch_distributed() -> None:
    """import-linter sees `torch` as one package, so this rule is held here."""
    assert {
        path.relative_to(ROOT / "lowtide").parts[0]
        for path in FILES
        if any(name.startswith("torch.distributed") for name in imports(path))
        or "torch.distributed." in path.read_text()
    } == {"distributed"}


def tracked() -> list[Path]:
    """What git holds or would take; without git, nothing to say."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    return [path for name in listed if (path := ROOT / name).is_file()]


def test_no_path_of_a_machine() -> None:
    texts = [
        path
        for path in tracked()
        if path.suffix in {".py", ".md", ".toml", ".json", ".txt", ".yml", ""}
    ]
    assert [
        short(path) for path in texts if MACHINE_PATH.search(path.read_text(errors="replace"))
    ] == []


HELP = """
import sys, time
start = time.process_time()  # of this process alone: the machine may be busy
from lowtide.cli import main
sys.argv = ["lowtide", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
heavy = {"torch", "diffusers", "transformers", "numpy", "matplotlib"}
print(time.process_time() - start, *(heavy & sys.modules.keys()))
"""


def test_help_is_quick_and_light() -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for _ in range(3)
    ]
    endings = [run.stdout.splitlines()[-1].split() for run in runs]
    assert [heavy for _, *heavy in endings] == [[], [], []]
    assert min(float(seconds) for seconds, *_ in endings) < 0.5
