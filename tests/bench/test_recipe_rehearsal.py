"""Every recipe file runs from end to end on random weights of its layout, and draws an image."""

from pathlib import Path

import pytest
import recipe_pipelines
import rehearse_recipes

from lowtide.workflows import recipe_files

STEPS = 2
# Rows that learn next to nothing, so that all layouts take seconds; the slow test has all methods.
QUICK = {
    "cifar10-ddim": "w4a32-ptq4dm",
    "bedrooms-ldm4": "w4a8-ptq4dm",
    "churches-ldm8": "w4a8-ptq4dm",
    "imagenet-ldm4": "w8a8-ptq4dm",
    "dit-xl2": "w4a8-temporal-cache",
    "sd14": "w4a8-tfmq",
    "sdxl": "w4a8-temporal-cache",
}


def rehearse(recipe: str, row: str, folder: Path) -> dict:
    pipe = recipe_pipelines.pipeline(recipe, folder, tiny=True)
    pipe.save_pretrained(folder / "float")
    return rehearse_recipes.rehearsed(recipe, row, folder / "float", STEPS)


def test_every_recipe_file_has_a_pipeline():
    files = {path.stem for path in rehearse_recipes.RECIPES.glob("*.toml")}
    assert files == set(recipe_pipelines.PIPELINES)
    builders = {recipe_pipelines.PIPELINES[name] for name in QUICK}
    assert builders == set(recipe_pipelines.PIPELINES.values())


@pytest.mark.parametrize("recipe", QUICK)
def test_a_row_goes_from_float_to_an_image(recipe, tmp_path):
    result = rehearse(recipe, QUICK[recipe], tmp_path)
    assert result["packed"] > 0
    assert result["published"]
    assert result["ours"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "row"),
    [
        (recipe, row)
        for recipe in recipe_pipelines.PIPELINES
        for row in rehearse_recipes.chosen_rows(recipe, "first")
    ],
)
def test_every_method_of_a_file_does(recipe, row, tmp_path):
    assert rehearse(recipe, row, tmp_path)["packed"] > 0


def test_what_is_cut_is_what_costs_time():
    path = rehearse_recipes.RECIPES / "imagenet-ldm4.toml"
    options = recipe_files.read(path).options(recipe_files.read(path).rows["w4a8-qdiffusion"])
    changes = rehearse_recipes.changes_of(options, STEPS)
    names = {change.partition("=")[0] for change in changes}
    assert names == {
        *("images", "steps", "iters", "range_iters", "calibration_steps", "batch", "labels")
    }
