"""Recipes: every file in recipes/ can be read; changes work, mistakes are one sentence."""

import re
from pathlib import Path

import pytest
import tiny
import torch

from lowtide import sampling
from lowtide.checkpoint import provenance
from lowtide.errors import BadInput
from lowtide.methods import PAPER_PROFILES, recipe_of, with_profile
from lowtide.methods.mpq import OMQ, TRD
from lowtide.methods.tcaq import DAQ, TCR
from lowtide.models import adapt
from lowtide.report.text import quantized
from lowtide.settings import Settings, settings_from
from lowtide.stages.assign import Assign
from lowtide.stages.base import Call, Job, recipe_digest
from lowtide.workflows import recipe_files, to_folder
from lowtide.workflows.setting_changes import changed

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
ROWS = [
    pytest.param(path, name, id=f"{path.stem}-{name}")
    for path in FILES
    for name in recipe_files.read(path).rows
]


def test_there_are_few_files_and_many_rows():
    assert len(FILES) <= 12
    assert len(ROWS) == 95


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_a_command_that_names_one_of_its_rows(path):
    lines = path.read_text().splitlines()
    command = re.fullmatch(r"# {5}lowtide run recipes/(\S+) (\S+) --out DIR", lines[2])
    assert command[1] == path.name
    assert command[2] in recipe_files.read(path).rows


@pytest.mark.parametrize(("path", "name"), ROWS)
def test_a_row_says_the_papers_number_and_ours_and_is_called_by_bits_and_method(path, name):
    recipe = recipe_files.read(path)
    row = recipe.rows[name]
    assert row.published
    assert row.ours
    settings = recipe.options(row)
    assert name.startswith(f"w{settings['weights']}a{settings['inputs']}-")
    assert name.endswith(row.method.replace("_", "-"))


@pytest.mark.parametrize(("path", "name"), [row for row in ROWS if row.id.endswith("tcaq")])
def test_where_daq_is_in_the_papers_number_attention_is_quantized(path, name):
    """Profile paper is that of Q-Diffusion for TCAQ-DM, whose softmax has 8 bits."""
    recipe = recipe_files.read(path)
    row = recipe.rows[name]
    settings = with_profile(row.method, settings_from(recipe.options(row)))
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    job = Job(pipe, pipe.unet, adapt(pipe.unet), settings, row.method)
    job.calls = [Call(500, {"timestep": torch.tensor([500])}, True)]
    Assign(per_step=True).run(job)
    assert job.plan.attentions
    for parts in job.plan.attentions.values():
        assert parts["q"].input.bits == settings.inputs and parts["softmax"].input.bits == 8
    assert DAQ() in recipe_of(row.method, settings, row.without)


@pytest.mark.parametrize(("path", "name"), ROWS)
def test_every_row_takes_the_profile_of_its_own_paper(path, name):
    recipe = recipe_files.read(path)
    row = recipe.rows[name]
    settings = settings_from(recipe.options(row))
    assert settings.profile == "paper" or row.method == "best"
    assert with_profile(row.method, settings).profile == PAPER_PROFILES.get(row.method, "full")


def test_the_samplers_are_those_of_the_papers():
    chosen = {path.stem: recipe_files.read(path).settings for path in FILES}
    samplers = {
        name: (settings["scheduler"], settings.get("spacing"))
        for name, settings in chosen.items()
        if "scheduler" in settings
    }
    assert samplers == {"cifar10-ddim": ("ddim", "quadratic"), "sd14": ("pndm", None)}


def test_eta_is_that_of_the_row():
    noisy = {path.stem for path in FILES if recipe_files.read(path).settings.get("eta") == 1}
    assert noisy == {"bedrooms-ldm4", "ffhq-ldm4"}
    assert not any("eta 0" in path.read_text() for path in FILES if path.stem in noisy)


@pytest.mark.parametrize(
    "family",
    ["cifar10", "bedrooms", "churches", "celebahq", "ffhq", "imagenet", "dit-xl2", "sd14", "sdxl"],
)
def test_every_family_of_the_papers_has_one(family):
    assert any(path.stem.startswith(family) for path in FILES)


def test_a_recipe_runs_with_changes(tmp_path, monkeypatch):
    heard = {}

    def quantize_to_folder(source, out, method, options):
        heard.update(source=source, method=method, options=options)
        return {}

    monkeypatch.setattr(to_folder, "quantize_to_folder", quantize_to_folder)
    path = tmp_path / "x.toml"
    path.write_text(
        'model = "zoo:digits"\nmethod = "tfmq"\nwithout = ["FSC"]\n'
        "[settings]\nweights = 3\nlabels = [1, 2]\n"
    )
    recipe_files.run_row(
        path,
        None,
        tmp_path / "out",
        changes=["iters=7", "profile=paper"],
        without=["tiar"],
        model="zoo:other",
    )
    assert heard["source"] == "zoo:other"
    expected = {
        "weights": 3,
        "labels": [1, 2],
        "iters": 7,
        "profile": "paper",
        "without": ("FSC", "tiar"),
    }
    assert heard["options"] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 3 = 4", "unreadable"),
        ('model = "x"', "missing required field 'method'"),
        ('method = "tfmq"', "missing required field 'model'"),
        ('model = 5\nmethod = "tfmq"', "Expected 'str', got 'int' - at '\\$.model'"),
        ('model = "x"\nmethod = "tfmq"\nsettings = 5', "Expected 'object', got 'int'"),
        ('model = "x"\nmethod = "tfmq"\nwithout = [5]', "Expected 'str', got 'int'"),
        ('model = "x"\nrows = 5', "Expected 'object', got 'int'"),
        ('model = "x"\n[rows.a]\nmethod = "tfmq"\nspeed = 1', "unknown field 'speed'"),
        ('model = "x"\nmethod = "magic"', "found method 'magic'"),
        (
            'model = "x"\nmethod = "tfmq"\nspeed = 1',
            "unknown field 'speed'",
        ),
        ('model = "x"\nmethod = "tfmq"\n[settings]\nbits = 4', "found setting 'bits'"),
        (
            'model = "x"\nmethod = "tfmq"\n[settings]\nweights = 9',
            "found weights 9; expected 1 to 8",
        ),
    ],
)
def test_mistakes_are_one_sentence(text, message, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        recipe_files.read(path)


MIXED = 'model = "x"\nmethod = "mpq"\n'


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "[stages.omega]\nplus = true",
            "found no stage 'omega' that takes options; "
            "expected one of Assign: per_step, own_ranges; OMQ: search",
        ),
        (
            "[stages.omq]\nmore = true",
            "found no option 'more' of OMQ; expected one of search, plus, smooth",
        ),
        ("[stages.omq]\nplus = 1", "found OMQ plus 1; expected true or false"),
        ("[stages.TRD]\nweight = true", "found TRD weight True; expected a number at least 0"),
        ("[stages.TRD]\nweight = -1", "found TRD weight -1; expected a number at least 0"),
        ("[stages.distill]\nrank = 0", "found Distill rank 0; expected a whole number at least 1"),
        ("[settings]\niters = 'abc'", "found iters 'abc'; expected a whole number at least 1"),
        ('[stages.omq]\nsearch = "slow"', "found search 'slow'; expected full or fast"),
        (
            '[stages.fitweights]\nsearch = "best"',
            "found search 'best'; expected minmax or mse or percentile",
        ),
        ("[stages]\nomq = true", "Expected 'object', got 'bool'"),
        ("[settings]\nstages = 3", "found stages 3"),
    ],
)
def test_mistakes_in_options_of_stages(table, message, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(MIXED + table)
    with pytest.raises(BadInput, match=re.escape(message)):
        recipe_files.read(path)


def test_options_go_from_the_file_through_changes_to_the_stages(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(
        to_folder, "quantize_to_folder", lambda source, out, method, options: heard.append(options)
    )
    path = tmp_path / "x.toml"
    path.write_text(
        MIXED + "[stages.OMQ]\nplus = true\n[stages.trd]\nweight = 3\n[settings]\nweights = 3\n"
    )
    recipe_files.run_row(
        path,
        None,
        tmp_path / "out",
        changes=["omq.search=fast", "omq.plus=false", "ndtc.std=1"],
        without=["trd"],
    )
    (options,) = heard
    assert options["stages"] == {
        "OMQ": {"plus": False, "search": "fast"},
        "trd": {"weight": 3},
        "ndtc": {"std": 1},
    }
    recipe = recipe_files.read(path)
    row = recipe.row(None)
    assert row.stages == {"OMQ": {"plus": True}, "trd": {"weight": 3}}
    stages = recipe_of("mpq", settings_from(recipe.options(row)), ("trd",))
    assert OMQ(plus=True) in stages and TRD(weight=3) not in stages and len(stages) == 7


def test_lists_of_a_file_are_tuples_of_a_stage_and_every_stage_of_a_name_takes_them():
    asked = {"daq": {"against": ["exponential", "log_normal"]}, "tcr": {"most": 4}}
    stages = recipe_of("tcaq", Settings(stages=asked))
    assert stages.count(DAQ(against=("exponential", "log_normal"))) == 2 and TCR(most=4) in stages
    with pytest.raises(
        BadInput, match=r"found DAQ against 'exponential'; expected a list, each a text"
    ):
        recipe_of("tcaq", Settings(stages={"daq": {"against": "exponential"}}))
    with pytest.raises(
        BadInput, match="found law 'normal'; expected some of exponential, log_normal"
    ):
        recipe_of("tcaq", Settings(stages={"daq": {"against": ["normal"]}}))


def test_a_change_must_be_a_setting():
    with pytest.raises(BadInput, match="found --set itters=5; expected a setting"):
        changed({}, ["itters=5"])
    with pytest.raises(BadInput, match="found no file"):
        recipe_files.read("nowhere.toml")


def test_a_row_is_chosen_by_name(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text('model = "x"\n[rows.a]\nmethod = "tfmq"\n[rows.b]\nmethod = "minmax"\n')
    recipe = recipe_files.read(path)
    assert recipe.row("b").method == "minmax"
    for name, message in ((None, "found 2 rows; expected one of a, b"), ("c", "found no row 'c'")):
        with pytest.raises(BadInput, match=message):
            recipe.row(name)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "model = 'x'".encode("utf-16"), b"\x00"])
def test_a_file_that_is_no_text_is_one_sentence(content, tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"found x.toml unreadable"):
        recipe_files.read(path)


def test_stages_can_be_left_out_of_a_run(tmp_path):
    tiny.model("unet2d").save_pretrained(tmp_path / "float")
    options = {
        "steps": 3,
        "images": 2,
        "calibration_steps": 1,
        "iters": 2,
        "batch": 2,
        "without": ("tiar",),
    }
    result = to_folder.quantize_to_folder(
        str(tmp_path / "float"), tmp_path / "out", "tfmq", options
    )
    assert "TIAR" not in result["seconds"]
    assert "Reconstruct" in result["seconds"]


def test_an_interrupted_run_does_not_go_on_with_other_options():
    asked = [{}, {"omq": {"plus": True}}, {"trd": {"weight": 1.0}}]
    digests = {
        recipe_digest(recipe_of("mpq", settings), settings, "abc")
        for settings in (Settings(stages=one) for one in asked)
    }
    assert len(digests) == 3


def test_an_option_of_a_stage_changes_the_bits_and_the_record(tmp_path):
    tiny.model("unet2d").save_pretrained(tmp_path / "float")
    options = {
        "weights": 3,
        "steps": 2,
        "images": 2,
        "calibration_steps": 1,
        "iters": 2,
        "batch": 2,
        "without": ("trd", "distill"),
    }
    source = str(tmp_path / "float")
    out = tmp_path / "out"
    plain = to_folder.quantize_to_folder(source, out, "mpq", options)
    more = to_folder.quantize_to_folder(
        source, out, "mpq", options | {"stages": {"omq": {"plus": True}}}
    )
    assert plain["mpq"]["average_bits"] == pytest.approx(3, abs=1e-9)
    # A tenth of each layer's channels, rounded down, and at least ten channels to a layer.
    assert 3.05 < more["mpq"]["average_bits"] <= 3.1
    assert more["predicted"]["on_disk"] > plain["predicted"]["on_disk"]
    assert (
        more["options"] == provenance.read(out).settings["stages"] == {"omq": {"plus": True}}
        and plain["options"] == {}
    )
    assert "with omq.plus=True" in quantized(more)
