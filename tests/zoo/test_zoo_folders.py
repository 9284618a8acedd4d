"""Where zoo models lie: small ones in the package, the others in the repository's zoo folder."""

from pathlib import Path

import pytest

from lowtide import zoo
from lowtide.errors import BadInput
from training.catalogue import ZOO_MODELS
from training.export import model_folder


@pytest.fixture
def empty_zoo(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(zoo, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(zoo, "REPOSITORY", tmp_path / "repository")
    monkeypatch.setattr(zoo, "BESIDE", tmp_path / "beside")
    return tmp_path


def add_model(folder: Path, mark: str = "model_index.json") -> Path:
    folder.mkdir(parents=True)
    (folder / mark).write_text("{}")
    return folder


def test_a_model_is_found_in_either_place(empty_zoo):
    small = add_model(empty_zoo / "package" / "small")
    large = add_model(empty_zoo / "repository" / "large")
    part = add_model(empty_zoo / "repository" / "part", mark="config.json")
    assert zoo.folder("small") == small
    assert zoo.folder("large") == large
    assert zoo.folder("part") == part
    assert zoo.names() == ["large", "small"]


def test_the_largest_model_is_found_beside_the_repository(empty_zoo):
    beside = add_model(empty_zoo / "beside" / "zoo-cifar10")
    add_model(empty_zoo / "beside" / "zoo-dogs")
    assert zoo.folder("cifar10") == beside
    assert zoo.names() == ["cifar10"]


def test_weights_of_ones_own_come_before_those_beside_the_repository(empty_zoo):
    add_model(empty_zoo / "beside" / "zoo-cifar10")
    own = add_model(empty_zoo / "repository" / "cifar10")
    assert zoo.folder("cifar10") == own


def test_training_puts_small_models_into_the_package(empty_zoo):
    assert model_folder("digits") == empty_zoo / "package" / "digits"
    assert model_folder("cifar10") == empty_zoo / "repository" / "cifar10"


def test_every_model_that_can_be_trained_has_a_place():
    assert sorted(ZOO_MODELS) == sorted(zoo.SHIPPED + zoo.REPOSITORY_ONLY + zoo.BESIDE_ONLY)


def test_the_package_holds_what_it_says():
    shipped = {path.parent.name for path in zoo.PACKAGE.glob("*/model_index.json")}
    assert shipped == set(zoo.SHIPPED)


def test_a_model_that_does_not_exist_is_named():
    with pytest.raises(BadInput, match=r"no zoo model called 'dogs'; expected one of .*digits"):
        zoo.folder("dogs")


@pytest.mark.parametrize("name", zoo.REPOSITORY_ONLY)
def test_a_model_that_the_wheel_lacks_is_to_be_had_in_the_repository(name, empty_zoo):
    with pytest.raises(BadInput, match=rf"found no zoo:{name} in this installation") as error:
        zoo.folder(name)
    message = str(error.value)
    assert message.endswith(f"pass the path of its zoo/{name} as the model")
    assert "called" not in message


@pytest.mark.parametrize("name", zoo.BESIDE_ONLY)
def test_a_model_too_large_for_the_repository_names_the_command_that_trains_it(name, empty_zoo):
    with pytest.raises(BadInput, match=rf"python zoo/train.py {name}"):
        zoo.folder(name)


def test_what_ships_is_small():
    for name in zoo.SHIPPED:
        weights = zoo.folder(name).rglob("*.safetensors")
        assert 0 < sum(path.stat().st_size for path in weights) <= 6_000_000
