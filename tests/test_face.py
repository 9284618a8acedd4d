"""The face: its stub is current, a type checker accepts right calls alone, its examples run."""

import ast
import doctest
import inspect
import json
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

import lowtide

ROOT = Path(__file__).parents[1]
CALLS = ROOT / "tests" / "face_calls.py"
FUNCTIONS = (
    "compare",
    "evaluate",
    "export",
    "load",
    "plan",
    "quantize",
    "recalibrate",
    "reschedule",
    "save",
)


def test_the_stub_is_written_from_the_settings():
    command = [sys.executable, "tools/face_stub.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == 0, "run `python tools/face_stub.py`"


def test_the_stub_names_what_the_face_has():
    text = (ROOT / "lowtide" / "__init__.pyi").read_text()
    for name in lowtide.__all__:
        assert f"def {name}(" in text or f" as {name}\n" in text


@pytest.mark.parametrize("name", ["export", "load", "recalibrate", "reschedule", "save"])
def test_the_stub_has_every_parameter_of_a_function_without_settings(name):
    stub = ast.parse((ROOT / "lowtide" / "__init__.pyi").read_text())
    [typed] = [node for node in stub.body if getattr(node, "name", "") == name]
    assert isinstance(typed, ast.FunctionDef)
    named = [argument.arg for argument in [*typed.args.args, *typed.args.kwonlyargs]]
    assert named == list(inspect.signature(getattr(lowtide, name)).parameters)


def test_a_type_checker_tells_right_calls_from_wrong_ones(tmp_path):
    config = {
        "include": [str(CALLS)],
        "extraPaths": [str(ROOT)],
        "pythonVersion": "3.11",
        "typeCheckingMode": "standard",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "-p", str(tmp_path)]
    command += ["--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    messages = json.loads(done.stdout)["generalDiagnostics"]
    errors = [one for one in messages if one["severity"] == "error"]
    lines = CALLS.read_text().splitlines()
    wrong = {number for number, line in enumerate(lines) if line.endswith("# wrong")}
    assert {one["range"]["start"]["line"] for one in errors} == wrong
    assert len(wrong) >= 20


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("quantize", lowtide.Settings),
        ("plan", lowtide.Settings),
        ("evaluate", lowtide.EvaluationSettings),
        ("compare", lowtide.EvaluationSettings),
    ],
)
def test_help_shows_every_option_as_a_keyword(name, options):
    parameters = inspect.signature(getattr(lowtide, name)).parameters
    assert "options" not in parameters
    plain = options()
    for field in fields(options):
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[field.name].default == getattr(plain, field.name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_function_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = getattr(lowtide, name)
    module = import_module(function.__module__)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(function, name, module=module, globs={})
    assert example.examples
    results = doctest.DocTestRunner(verbose=False).run(example)
    assert results.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_says_what_arguments_and_result(name):
    text = inspect.getdoc(getattr(lowtide, name))
    for heading in ("Args:", "Returns:", "Examples:"):
        assert heading in text


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="quantise"):
        _ = lowtide.quantise


IMPORT = """
import sys, time
start = time.process_time()
import lowtide
print(time.process_time() - start, *({"torch", "diffusers", "numpy"} & sys.modules.keys()))
"""


def test_import_is_quick_and_light():
    command = [sys.executable, "-c", IMPORT]
    runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True) for _ in range(3)]
    endings = [run.stdout.split() for run in runs]
    assert [heavy for _, *heavy in endings] == [[], [], []]
    assert min(float(seconds) for seconds, *_ in endings) < 0.3
