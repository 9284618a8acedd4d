"""Which settings each method reads; a setting that it ignores is refused in one sentence."""

from dataclasses import fields

import pytest

from lowtide.errors import BadInput
from lowtide.methods import METHODS, recipe_of, relevant_options
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.collect import Collect

# A value that is not the default, for each setting that some methods ignore.
CHANGES = {
    "calibration_steps": 5,
    "iters": 7,
    "batch": 3,
    "scope": "layer",
    "drop": 0.5,
    "range_iters": 9,
    "early_stop": True,
    "only_schedule": True,
}
RECONSTRUCTS = {"calibration_steps", "iters", "batch", "scope", "drop", "early_stop", "range_iters"}
READ = {
    "best": RECONSTRUCTS | {"only_schedule"},
    "minmax": set(),
    "ptq4dm": {"calibration_steps"},
    "qdiffusion": RECONSTRUCTS,
    "ptqd": RECONSTRUCTS,
    "tfmq": RECONSTRUCTS,
    "temporal_cache": RECONSTRUCTS | {"only_schedule"},
    "tcaq": RECONSTRUCTS,
    "efficientdm": {"iters", "batch"},
    "mpq": {"calibration_steps", "iters", "batch"},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_setting_is_read_or_refused(method, name):
    settings = Settings(**{name: CHANGES[name]})
    if name in READ[method]:
        assert recipe_of(method, settings)
        return
    with pytest.raises(BadInput) as refused:
        recipe_of(method, settings)
    words = str(refused.value)
    assert words.startswith(f"found {name} {CHANGES[name]} with {method}, which ignores it;")
    assert f"leave {name} out" in words
    readers = words.split("read it: ")[1].split(";")[0].split(", ")
    assert set(readers) == {other for other in METHODS if name in READ[other]}


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_never_refused(method):
    defaults = {each.name: getattr(Settings(), each.name) for each in fields(Settings)}
    assert recipe_of(method, Settings(**defaults)) == recipe_of(method, Settings())
    assert relevant_options(method, defaults) == defaults


def test_every_setting_is_read_by_all_methods_or_by_some():
    always = (
        Assign.reads
        | Collect.reads
        | {
            "seed",
            "memory",
            "device",
            "dtype",
            "place",
            "stages",
        }
    )
    assert always | CHANGES.keys() == {each.name for each in fields(Settings)}
    assert not always & CHANGES.keys()
    stages = [stage for method in METHODS for stage in recipe_of(method, Settings(range_iters=0))]
    assert frozenset().union(*(stage.reads for stage in stages)) <= always | CHANGES.keys()


@pytest.mark.parametrize("method", METHODS)
def test_the_options_that_a_method_reads_are_picked(method):
    changes = {name: value for name, value in CHANGES.items() if name != "drop"}
    options = {"weights": 3, "seed": 4, **changes}
    relevant = relevant_options(method, options)
    assert relevant.keys() == {"weights", "seed"} | (READ[method] & changes.keys())
    assert recipe_of(method, Settings(**relevant))


def test_an_ablation_needs_no_other_settings():
    """A stage that is left out does not change which settings are accepted."""
    settings = Settings(iters=7, scope="layer")
    assert len(recipe_of("tfmq", settings, ("tiar", "reconstruct"))) == 6


def test_a_method_that_is_unknown():
    for act in (recipe_of, relevant_options):
        with pytest.raises(BadInput, match="found method 'magic'"):
            act("magic", Settings() if act is recipe_of else {})
