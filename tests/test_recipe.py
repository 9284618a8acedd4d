"""Recipes: every file in recipes/ reads and opens as promised; changes and mistakes are told plainly."""

from pathlib import Path

import pytest
import tiny

from lowtide import recipe, run
from lowtide.errors import BadInput

FILES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_command_the_papers_number_and_ours(path):
    lines = path.read_text().splitlines()
    assert lines[0] == f"# lowtide run recipes/{path.name} --out {path.stem}"
    assert any(line.startswith("# Here: ") for line in lines[:5])
    found = recipe.read(path)
    width = f"w{found.settings['weights']}a{found.settings['inputs']}"
    assert width in path.stem
    assert path.stem.endswith(found.method.replace("_", "-"))


def test_every_family_of_the_papers_has_one():
    stems = " ".join(path.stem for path in FILES)
    for family in ("cifar10", "bedrooms", "churches", "celebahq", "ffhq", "imagenet", "dit-xl2", "sd14", "sdxl"):
        assert family in stems


def test_a_recipe_runs_with_changes(tmp_path, monkeypatch):
    heard = {}

    def quantize_to_folder(source, out, method, options):
        heard.update(source=source, method=method, options=options)
        return {}

    monkeypatch.setattr(run, "quantize_to_folder", quantize_to_folder)
    path = tmp_path / "x.toml"
    path.write_text('model = "zoo:digits"\nmethod = "tfmq"\nwithout = ["FSC"]\n[settings]\nweights = 3\nlabels = [1, 2]\n')
    recipe.cook(path, tmp_path / "out", changes=["iters=7", "profile=paper"], without=["tiar"], model="zoo:other")
    assert heard["source"] == "zoo:other"
    expected = {"weights": 3, "labels": [1, 2], "iters": 7, "profile": "paper", "without": ("FSC", "tiar")}
    assert heard["options"] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 3 = 4", "unreadable"),
        ('model = "x"', "found no method in x.toml"),
        ('model = "x"\nmethod = "magic"', "found method 'magic'"),
        ('model = "x"\nmethod = "tfmq"\nspeed = 1', "found 'speed' in x.toml; expected one of method, model"),
        ('model = "x"\nmethod = "tfmq"\n[settings]\nbits = 4', "found setting 'bits'"),
        ('model = "x"\nmethod = "tfmq"\n[settings]\nweights = 9', "found 9 bits for weights"),
    ],
)
def test_mistakes_are_one_sentence(text, message, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        recipe.read(path)


def test_a_change_must_be_a_setting():
    with pytest.raises(BadInput, match="found --set itters=5; expected a setting"):
        recipe.changed({}, ["itters=5"])
    with pytest.raises(BadInput, match="found no file"):
        recipe.read("nowhere.toml")


def test_stages_can_be_left_out_of_a_run(tmp_path):
    tiny.model("unet2d").save_pretrained(tmp_path / "float")
    options = {"steps": 3, "images": 2, "kept": 1, "iters": 2, "batch": 2, "without": ("tiar",)}
    result = run.quantize_to_folder(str(tmp_path / "float"), tmp_path / "out", "tfmq", options)
    assert "TIAR" not in result["seconds"]
    assert "Reconstruct" in result["seconds"]
