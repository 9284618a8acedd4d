"""Recipes run stage by stage, and each stage says what it did."""

import io
import re
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from rich.console import Console

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.models import adapt
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Stage, ablated, checked, recipe_digest, run_recipe, tuned
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.learn_ranges import LearnRanges
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import Reconstruct
from lowtide.stages.tiar import TIAR


@dataclass(frozen=True)
class Silent(Stage):
    """A stage whose class speaks for it."""

    def run(self, job: Job) -> None:
        pass


def test_every_stage_says_what_it_did_and_how_long_it_took():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    settings = Settings(steps=3, images=2, calibration_steps=2, iters=1, batch=2, inputs=4)
    console = Console(file=io.StringIO(), width=40)
    job = Job(pipe, pipe.unet, adapt(pipe.unet), settings, "test", console=console)
    start = (Collect(), Assign(per_step=True), FitWeights("minmax"), TIAR(), Reconstruct())
    run_recipe((*start, FitRanges(), LearnRanges(iters=1), Silent(), Pack()), job)
    lines = console.file.getvalue().splitlines()
    layers = len(job.plan.layers)
    blocks = len([unit for unit in job.adapter.units() if unit.kind != "temporal"])
    expected = [
        "Collect: 3 calls of the denoiser recorded at 3 timesteps",
        f"Assign: formats chosen for {layers} layers",
        f"FitWeights: weights of {layers} layers rounded to nearest",
        "TIAR: rounding of the temporal block learnt for its own features",
        f"Reconstruct: rounding of {blocks} blocks learnt",
        r"FitRanges: ranges of \d+ inputs fitted",
        f"LearnRanges: input ranges of {blocks} blocks learnt",
        "Silent: a stage whose class speaks for it",
        f"Pack: codes of {layers} layers packed",
    ]
    said = [line for line in lines if re.search(r"\d s$", line)]
    for line, words in zip(said, expected, strict=True):
        assert re.fullmatch(rf"{words}, \d+\.\d s", line)
    names = [words.split(":")[0] for words in expected]
    assert list(job.report["seconds"]) == list(job.report["summaries"]) == names


def silent_job(**fields) -> Job:
    model = torch.nn.Linear(1, 1)
    job = Job(None, model, None, Settings(), "test", console=Console(file=io.StringIO()))
    return replace(job, **fields)


def test_seconds_add_up_over_stages_of_one_name(monkeypatch):
    times = iter([10.0, 12.5, 20.0, 21.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    job = silent_job()
    run_recipe((Silent(), Silent()), job)
    assert job.report["seconds"] == {"Silent": 3.75}


def test_results_of_units_are_kept_by_stage_and_unit(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([1, 2])}
    job = silent_job(folder=tmp_path / "new" / "folder")
    assert job.recorded("Stage", "block.0") is None
    job.record("Stage", "block.0", tensors)
    again = silent_job(folder=job.folder).recorded("Stage", "block.0")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert job.recorded("Stage", "block.1") is job.recorded("Other", "block.0") is None
    found = {path.name for path in job.folder.rglob("*.*")}
    assert found == {"conditions.json", "Stage-block.0.safetensors"}
    loose = silent_job()
    loose.record("Stage", "block.0", tensors)
    assert loose.recorded("Stage", "block.0") is None


def test_stages_are_left_out_by_name_in_any_case_of_letters():
    recipe = (Collect(), TIAR(), Reconstruct(), Reconstruct(round=1), Pack())
    assert ablated(recipe, []) == recipe
    assert ablated(recipe, ["TIAR"]) == recipe[:1] + recipe[2:]
    assert ablated(recipe, ["tiar", "RECONSTRUCT"]) == (Collect(), Pack())


@pytest.mark.parametrize(
    ("recipe", "without", "words"),
    [
        ((Collect(), TIAR()), "tiar", "found without='tiar'; expected a list of stages; give"),
        ((Collect(), TIAR()), ["x"], "found no stage 'x'; expected one of Collect, TIAR;"),
        ((Collect(), TIAR(), Reconstruct()), ["collect"], "out TIAR or Reconstruct"),
        ((Collect(), Pack()), ["collect"], "use no --without with this method"),
    ],
)
def test_what_cannot_be_left_out_is_said(recipe, without, words):
    with pytest.raises(BadInput, match=re.escape(words)):
        ablated(recipe, without)


def test_options_reach_every_stage_of_a_name():
    recipe = (Collect(), Reconstruct(), Reconstruct(round=1), TIAR())
    tuned_recipe = tuned(recipe, {"reconstruct": {"round": 3}, "TIAR": {"times": 2}})
    assert tuned_recipe == (Collect(), Reconstruct(round=3), Reconstruct(round=3), TIAR(times=2))
    assert tuned(recipe, {}) == recipe


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"collect": {"a": 1}},
            "found no stage 'collect' that takes options; expected one of TIAR:",
        ),
        ({"tiar": {"time": 1}}, "found no option 'time' of TIAR; expected one of times, at_once;"),
        ({"tiar": {"times": 0}}, "found TIAR times 0"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, words):
    with pytest.raises(BadInput, match=re.escape(words)):
        tuned((Collect(), TIAR()), options)


def test_every_stage_checks_the_settings():
    seen: list[Settings] = []

    @dataclass(frozen=True)
    class Asking(Silent):
        def check(self, settings: Settings) -> None:
            seen.append(settings)

    recipe = (Asking(), Silent(), Asking())
    settings = Settings(steps=3)
    assert checked(recipe, settings) is recipe
    assert [each is settings for each in seen] == [True, True]


def test_a_digest_is_of_stages_options_settings_and_weights():
    recipe = (Collect(), TIAR())
    digest = recipe_digest(recipe, Settings(), "weights")
    assert re.fullmatch("[0-9a-f]{12}", digest)
    assert recipe_digest((Collect(), TIAR()), Settings(), "weights") == digest
    others = [
        recipe_digest((Collect(), TIAR(times=4)), Settings(), "weights"),
        recipe_digest((Collect(), Silent()), Settings(), "weights"),
        recipe_digest(recipe, Settings(steps=3), "weights"),
        recipe_digest(recipe, Settings(), "others"),
    ]
    assert len({digest, *others}) == 5
    orders = [{"tiar": {"times": 2}, "omq": {}}, {"omq": {}, "tiar": {"times": 2}}]
    first, second = (recipe_digest(recipe, Settings(stages=each), "weights") for each in orders)
    assert first == second


def test_arguments_go_to_the_device_of_the_model_whatever_they_are_nested_in():
    job = silent_job(model=torch.nn.Linear(1, 1, device="meta"))
    tree = {"x": torch.ones(2), "nested": [{"y": (torch.ones(3), 5)}], "text": "a"}
    moved = job.on_device(tree)
    assert moved["x"].device == moved["nested"][0]["y"][0].device == job.device
    assert job.device == torch.device("meta")
    assert (moved["nested"][0]["y"][1], moved["text"]) == (5, "a")
