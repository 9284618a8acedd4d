"""Compared models: distinct names, keys that are valid folder names, and bytes on disk."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
from packed_pair import pair

from lowtide import sampling
from lowtide.checkpoint import facts
from lowtide.errors import BadInput
from lowtide.evaluation import compared_models


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("tfmq W4A8", "tfmq-w4a8"),
        ("a/b: c..", "a-b-c"),
        ("été", "t"),
        ("../..", "model"),
        ("", "model"),
    ],
)
def test_slug(name, key):
    assert compared_models.slug(name) == key


def test_names_and_keys_are_distinct():
    one = compared_models.load(pair()[1])
    sources = [replace(one, source=source) for source in ("elsewhere/run", "elsewhere/b")]
    models = compared_models.distinct([one, *sources, replace(one, name="x")])
    names = ["minmax W4A8, run", "minmax W4A8, run", "minmax W4A8, b", "x"]
    assert [model.name for model in models] == names
    keys = ["minmax-w4a8-run", "minmax-w4a8-run-1", "minmax-w4a8-b", "x"]
    assert [model.key for model in models] == keys


def test_a_model_from_a_folder():
    model, packed = map(compared_models.load, pair())
    assert (model.kind, packed.kind) == ("float", "lowtide")
    assert (model.name, packed.name) == ("model in float", "minmax W4A8")
    weights = next((pair()[0] / "unet").glob("*.safetensors"))
    assert model.bytes == weights.stat().st_size
    assert packed.record.settings["steps"] == 3
    assert model.record is None


def test_a_model_in_memory_has_the_bytes_of_its_parameters():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    assert compared_models.load(pipe).bytes == facts.parameter_bytes(pipe.unet)


def test_an_empty_folder(tmp_path):
    with pytest.raises(BadInput, match="found no model in"):
        compared_models.load(tmp_path)


@pytest.mark.parametrize("entry", ["source", "fingerprint", "settings", "report"])
def test_a_record_with_a_damaged_entry(entry, tmp_path):
    folder = shutil.copytree(pair()[1], tmp_path / "run")
    path = folder / "lowtide.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: [1]}))
    with pytest.raises(BadInput, match=rf"lowtide.json in .*run with a damaged '{entry}'"):
        compared_models.load(folder)
