"""The size of a checkpoint: predicted from shapes alone, it is the size of the file."""

from pathlib import Path

import pytest
import tiny_pipelines
import torch

import lowtide
from lowtide.checkpoint import facts
from lowtide.estimate import blueprint, size
from lowtide.methods import METHODS, relevant_options
from lowtide.models import adapt
from lowtide.settings import settings_from

QUICK = {"steps": 3, "images": 2, "calibration_steps": 2, "iters": 2, "batch": 2}
UNMIXED = {"omq": {"mix": False}}  # only data decides which channels change their bits


def predicted_size(folder: Path, method: str, options: dict) -> dict[str, int]:
    settings = settings_from(options)
    pipeline = blueprint.read(str(folder))
    recipe = METHODS[method](settings)
    plan = size.planned(pipeline, pipeline.adapter(settings), recipe, settings, method)
    return size.checkpoint_bytes(pipeline, plan)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("ddim", "minmax", {}),
        ("ddim", "tfmq", {"weights": 3}),
        ("ddim", "tfmq", {"group": 16, "profile": "tfmq"}),
        ("ddim", "tfmq", {"weights": 16, "inputs": 6}),
        ("ddim", "temporal_cache", {}),
        ("ddim", "temporal_cache", {"only_schedule": True}),
        ("ddim", "temporal_cache", {"inputs": 16, "profile": "tfmq"}),
        ("ddim", "temporal_cache", {"inputs": 16, "profile": "tfmq", "only_schedule": True}),
        ("ddim", "efficientdm", {"weights": 8}),
        ("ddim", "qdiffusion", {}),
        ("sd", "ptqd", {"range_iters": 2}),
        ("dit", "best", {"labels": (1, 3), "stages": UNMIXED}),
        ("sd", "tfmq", {}),
        ("sdxl", "temporal_cache", {}),
        ("sd3", "tfmq", {"inputs": 32}),
        ("flux", "best", {"stages": UNMIXED}),
    ],
)
def test_predicted_size_is_the_size_of_the_file(
    name: str, method: str, options: dict, tmp_path: Path
) -> None:
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    options = relevant_options(method, QUICK | tiny_pipelines.request_fields(name) | options)
    pipe.save_pretrained(tmp_path / "float")
    predicted = predicted_size(tmp_path / "float", method, options)
    result = lowtide.quantize(pipe, method=method, **options)
    real = facts.on_disk(result.save(tmp_path / "packed"))
    account = result.report["account"]
    for kind in ("codes", "scales", "tables", "float"):
        assert predicted[kind] == account[kind], kind
    assert predicted["total"] == pytest.approx(real, rel=0.002)


@pytest.mark.parametrize(
    ("method", "options"),
    [("tcaq", {"weights": 2, "inputs": 6}), ("tcaq", {"weights": 8, "inputs": 4})],
)
def test_tables_that_a_layer_may_do_without_are_counted(
    method: str, options: dict, tmp_path: Path
) -> None:
    """TCR leaves a layer alone where it gains nothing, which only data decides."""
    pipe = tiny_pipelines.ddim(tmp_path)
    pipe.save_pretrained(tmp_path / "float")
    predicted = predicted_size(tmp_path / "float", method, QUICK | options)
    result = lowtide.quantize(pipe, method=method, **QUICK | options)
    assert predicted["codes"] == result.report["account"]["codes"]
    assert 0.93 < facts.on_disk(result.save(tmp_path / "packed")) / predicted["total"] <= 1.002


def test_channels_of_mixed_bits_are_sized_as_if_they_were_not(tmp_path: Path) -> None:
    """Heavy tails in every tenth channel give some channels a bit; the average stays."""
    pipe = tiny_pipelines.ddim(tmp_path)
    with torch.no_grad():
        for layer in adapt(pipe.unet).layers():
            weight = pipe.unet.get_submodule(layer).weight
            weight[::10] *= torch.randn_like(weight[::10]) ** 2
    pipe.save_pretrained(tmp_path / "float")
    options = QUICK | {"weights": 3}
    predicted = predicted_size(tmp_path / "float", "mpq", options)
    result = lowtide.quantize(pipe, method="mpq", **options)
    assert predicted["codes"] == pytest.approx(result.report["account"]["codes"], rel=0.01)
    real = facts.on_disk(result.save(tmp_path / "packed"))
    assert predicted["total"] == pytest.approx(real, rel=0.1)
