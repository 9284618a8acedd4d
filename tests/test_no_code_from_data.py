"""Nothing that lowtide reads is run: no pickles, no eval, no shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1] / "lowtide"
PICKLES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "os.execv", "pty.spawn", "subprocess.getoutput"}
LOADERS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def keywords(call: ast.Call) -> dict[str | None, object]:
    values = {each.arg: each.value for each in call.keywords}
    return {
        name: value.value if isinstance(value, ast.Constant) else None
        for name, value in values.items()
    }


def dangers(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in PICKLES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "") in PICKLES:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            yield from danger_of(node)


def danger_of(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = keywords(call)
    if name in RUNNERS | SHELLS or name.startswith(("pickle.", "yaml.load", "yaml.unsafe")):
        yield name
    if given.get("shell", False) is not False:
        yield f"{name} with a shell"
    if name in LOADERS:
        option, value = LOADERS[name]
        default = name == "np.load"  # numpy's default is the safe one
        if given.get(option, value if default else None) is not value:
            yield f"{name} without {option}={value}"


def test_nothing_that_is_read_is_run() -> None:
    found = {
        path.relative_to(HOME).as_posix(): names
        for path in sorted(HOME.rglob("*.py"))
        if (names := list(dangers(path.read_text())))
    }
    # Its exception is caught there; the file is read with weights_only.
    assert found == {"workflows/compvis/conversion.py": ["pickle"]}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "yaml.load(text)",
    ],
)
def test_each_danger_is_seen(line: str) -> None:
    assert len(list(dangers(line))) == 1


@pytest.mark.parametrize(
    "line",
    ["model.eval()", "np.load(path)", "torch.load(path, weights_only=True)", "re.compile(x)"],
)
def test_what_is_harmless_is_not(line: str) -> None:
    assert list(dangers(line)) == []
