"""Subjects: names that tell models apart, keys that folders can have, and bytes on disk."""

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


def test_names_and_keys_of_their_own():
    one = compared_models.load(pair()[1])
    found = compared_models.distinct(
        [
            one,
            replace(one, source="elsewhere/run"),
            replace(one, source="elsewhere/b"),
            replace(one, name="x"),
        ]
    )
    assert [each.name for each in found] == [
        "minmax W4A8, run",
        "minmax W4A8, run",
        "minmax W4A8, b",
        "x",
    ]
    assert [each.key for each in found] == [
        "minmax-w4a8-run",
        "minmax-w4a8-run-1",
        "minmax-w4a8-b",
        "x",
    ]


def test_what_a_folder_tells():
    model, packed = map(compared_models.load, pair())
    assert (model.kind, packed.kind) == ("float", "lowtide")
    assert (model.name, packed.name) == ("model in float", "minmax W4A8")
    assert model.bytes == next((pair()[0] / "unet").glob("*.safetensors")).stat().st_size
    assert packed.record.settings["steps"] == 3 and model.record is None


def test_a_model_in_memory_has_the_bytes_of_its_parameters():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    assert compared_models.load(pipe).bytes == facts.parameter_bytes(pipe.unet)


def test_an_empty_folder(tmp_path):
    with pytest.raises(BadInput, match="found no model in"):
        compared_models.load(tmp_path)
