"""lowtide.json: what is written is read back, damage is one sentence, the command is exact."""

import json

import pytest

from lowtide.checkpoint import provenance
from lowtide.errors import BadInput

RECORD = provenance.Provenance(
    "lowtide quantize x --out y",
    "x",
    "abc",
    "tfmq",
    {"steps": 3, "labels": [1]},
    ("tiar",),
    {"minutes": 1.5},
)


def test_there_and_back(tmp_path):
    RECORD.write(tmp_path)
    assert provenance.read(tmp_path) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["lowtide.json"]


def test_no_record(tmp_path):
    assert provenance.read(tmp_path) is None and provenance.read(None) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "without": []}'])
def test_a_damaged_record(tmp_path, text):
    (tmp_path / "lowtide.json").write_text(text)
    with pytest.raises(BadInput, match="unreadable"):
        provenance.read(tmp_path)


def test_a_record_of_the_future(tmp_path):
    RECORD.write(tmp_path)
    path = tmp_path / "lowtide.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(BadInput, match="version 2"):
        provenance.read(tmp_path)


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/bin/lowtide", "quantize", "a b", "-w", "4"], "lowtide quantize 'a b' -w 4"),
        (["lowtide/__main__.py", "demo"], "lowtide demo"),
        (["train.py", "x"], "train.py, through lowtide's Python interface"),
        ([""], "Python, through lowtide's Python interface"),
    ],
)
def test_the_command(monkeypatch, argv, command):
    monkeypatch.setattr("sys.argv", argv)
    assert provenance.command() == command
