"""Where zoo models lie: small ones in the package, others beside it."""

import pytest

from lowtide import zoo
from lowtide.errors import BadInput


def place(folder, mark="model_index.json"):
    folder.mkdir(parents=True)
    (folder / mark).write_text("{}")
    return folder


def test_a_model_is_found_in_either_place(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "INSIDE", tmp_path / "inside")
    monkeypatch.setattr(zoo, "BESIDE", tmp_path / "beside")
    small, large = place(tmp_path / "inside" / "small"), place(tmp_path / "beside" / "large")
    part = place(tmp_path / "beside" / "part", "config.json")
    assert (zoo.folder("small"), zoo.folder("large"), zoo.folder("part")) == (small, large, part)
    assert zoo.names() == ["large", "small"]


def test_training_puts_small_models_into_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "INSIDE", tmp_path / "inside")
    monkeypatch.setattr(zoo, "BESIDE", tmp_path / "beside")
    assert zoo.home("digits") == tmp_path / "inside" / "digits"
    assert zoo.home("cifar10") == tmp_path / "beside" / "cifar10"


def test_a_model_that_is_not_here_is_named():
    with pytest.raises(BadInput, match=r"no zoo model called 'dogs'; expected one of .*digits"):
        zoo.folder("dogs")


def test_what_ships_is_small():
    assert "digits" in zoo.names()
    for name in set(zoo.SHIPPED) & set(zoo.names()):
        assert sum(path.stat().st_size for path in zoo.folder(name).rglob("*.safetensors")) <= 6_000_000
