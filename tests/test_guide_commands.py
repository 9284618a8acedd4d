"""The commands of the pages: lowtide takes each of them, and the worked guide runs as it stands."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from lowtide.cli.commands import app

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guides" / "my-fine-tune.md"
NOT_RUN = "# not run here"
# Words in capitals stand for a user's own names: RUN, FOLDER.
PLACEHOLDER = re.compile(r"\.\.\.|\[.*\]|\bNAME\b")


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each block that is to be run."""
    found = re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [(language, text) for language, text in found if not text.startswith(NOT_RUN)]


def command_lines() -> list[tuple[str, str]]:
    """Every line of a page that calls lowtide, with the lines that continue it."""
    lines = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for language, text in blocks(page):
            if language == "bash":
                whole = text.replace("\\\n", " ").splitlines()
                lines += [(page.name, line) for line in whole if line.startswith("lowtide ")]
    return lines


LINES = command_lines()


def test_pages_have_commands():
    assert len(LINES) > 30
    assert {"README.md", "quickstart.md", "my-fine-tune.md"} <= {page for page, _ in LINES}


@pytest.mark.parametrize(("page", "line"), LINES)
def test_every_command_of_a_page_is_one_that_lowtide_takes(page, line):
    words = shlex.split(line, comments=True)[1:]
    if any(PLACEHOLDER.search(word) for word in words):
        pytest.skip("it stands for several commands")
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    context = command.make_context(name, words)  # raises where it does not fit
    assert context.args == []


def run(language: str, text: str, home: Path) -> None:
    """One block, as a reader would run it, with this Python and its lowtide."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    command = ["bash", "-ec", text] if language == "bash" else [sys.executable, "-c", text]
    subprocess.run(command, cwd=home, env=environment, check=True, timeout=1500)


@pytest.mark.slow
def test_the_worked_guide_runs_from_a_folder_to_a_shared_model(tmp_path):
    pytest.importorskip("peft")
    for name in ("zoo", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for language, text in blocks(GUIDE):
        run(language, text, tmp_path)
    assert (tmp_path / "rocket.png").is_file()
    assert (tmp_path / "lora.png").is_file()
    evidence = json.loads((tmp_path / "my-emoji-w4a8" / "evidence" / "evidence.json").read_text())
    assert evidence["models"]
    card = (tmp_path / "my-emoji-w4a8" / "README.md").read_text()
    assert "base_model_relation: quantized" in card
