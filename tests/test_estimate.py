"""The estimate: sizes against files, calls against trajectories, multiply-adds against torch's counter, memory against a run."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from models.configs import CONFIGS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lowtide
from lowtide import estimate, sampling
from lowtide.checkpoint import facts
from lowtide.costs import speed, work
from lowtide.errors import BadInput
from lowtide.estimate import blueprint, size
from lowtide.methods import METHODS
from lowtide.models import ARCHITECTURES, adapt
from lowtide.models.trace import flat_inputs
from lowtide.settings import Settings, settings_from

QUICK = {"steps": 3, "images": 2, "calibration_steps": 2, "iters": 2, "batch": 2}
UNMIXED = {"omq": {"mix": False}}  # which channels change their bits is for the data to say
QUIET_PRODUCTS = speed.Products(1e-11, 2e-11, 1e-11, 2e-11)
QUIET_SPEED = speed.Speed(QUIET_PRODUCTS, QUIET_PRODUCTS, 1e-10, 1e-10, 1e-8, 1e-7, 1e-5, 2e-5)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known speed."""
    monkeypatch.setattr(estimate, "measured", lambda network: QUIET_SPEED)


def predicted_size(folder: Path, method: str, options: dict) -> dict[str, int]:
    settings, found = settings_from(options), blueprint.read(str(folder))
    plan = size.planned(found, found.adapter(settings), METHODS[method](settings), settings, method)
    return size.checkpoint_bytes(found, plan)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("ddim", "minmax", {}),
        ("ddim", "tfmq", {"weights": 3}),
        ("ddim", "tfmq", {"group": 16, "profile": "paper"}),
        ("ddim", "tfmq", {"weights": 16, "inputs": 6}),
        ("ddim", "temporal_cache", {"keep_temporal": True}),
        ("ddim", "temporal_cache", {"inputs": 16, "profile": "paper"}),
        ("ddim", "temporal_cache", {"inputs": 16, "profile": "paper", "keep_temporal": True}),
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
    options = QUICK | tiny_pipelines.asked(name) | options
    pipe.save_pretrained(tmp_path / "float")
    predicted = predicted_size(tmp_path / "float", method, options)
    result = lowtide.quantize(pipe, method=method, **options)
    real = facts.on_disk(result.save(tmp_path / "packed"))
    account = result.report["account"]
    assert {kind: predicted[kind] for kind in ("codes", "scales", "tables", "float")} == {
        kind: account[kind] for kind in ("codes", "scales", "tables", "float")
    }
    assert predicted["total"] == pytest.approx(real, rel=0.002)


@pytest.mark.parametrize(
    ("method", "options"),
    [("tcaq", {"weights": 2, "inputs": 6}), ("tcaq", {"weights": 8, "inputs": 4})],
)
def test_tables_that_a_layer_may_do_without_are_counted(
    method: str, options: dict, tmp_path: Path
) -> None:
    """TCR leaves a layer alone where it gains nothing, which only data can tell."""
    pipe = tiny_pipelines.ddim(tmp_path)
    pipe.save_pretrained(tmp_path / "float")
    predicted = predicted_size(tmp_path / "float", method, QUICK | options)
    result = lowtide.quantize(pipe, method=method, **QUICK | options)
    assert predicted["codes"] == result.report["account"]["codes"]
    assert 0.93 < facts.on_disk(result.save(tmp_path / "packed")) / predicted["total"] <= 1.002


def test_channels_of_mixed_bits_are_sized_as_if_they_were_not(tmp_path: Path) -> None:
    pipe = tiny_pipelines.ddim(tmp_path)
    with (
        torch.no_grad()
    ):  # heavy tails in every tenth channel, so that some earn a bit: their average stays
        for layer in adapt(pipe.unet).layers():
            weight = pipe.unet.get_submodule(layer).weight
            weight[::10] *= torch.randn_like(weight[::10]) ** 2
    pipe.save_pretrained(tmp_path / "float")
    options = QUICK | {"weights": 3}
    predicted = predicted_size(tmp_path / "float", "mpq", options)
    result = lowtide.quantize(pipe, method="mpq", **options)
    assert predicted["codes"] == pytest.approx(result.report["account"]["codes"], rel=0.01)
    assert predicted["total"] == pytest.approx(
        facts.on_disk(result.save(tmp_path / "packed")), rel=0.1
    )


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_calls_are_those_of_the_real_trajectory(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    pipe.save_pretrained(tmp_path / "float")
    settings = Settings(steps=4, images=3, **tiny_pipelines.asked(name))
    found = blueprint.read(str(tmp_path / "float"))
    request = sampling.Request(
        4, (1, 2, 3), settings.prompts, settings.labels, batch=3, size=settings.size
    )
    moments = list(sampling.trajectory(pipe, request))
    load = estimate.workload(found, work.Network(found.adapter(settings)), settings, QUIET_SPEED)
    assert load.calls == len(moments)
    assert load.batch == len(moments[0].t)
    ours = {key: value.shape for key, value in blueprint_inputs(found.example(settings)).items()}
    theirs = {
        key: value.shape
        for key, value in blueprint_inputs(moments[0].arguments).items()
        if key in ours
    }
    assert {key: shape[1:] for key, shape in ours.items()} == {
        key: shape[1:] for key, shape in theirs.items()
    }


def blueprint_inputs(arguments: dict) -> dict[str, torch.Tensor]:
    """Tensors by dotted name, those without a batch axis aside."""
    found = flat_inputs(arguments)
    return {
        name: value
        for name, value in found.items()
        if name not in ("img_ids", "txt_ids", "timestep")
    }


@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler]
)
def test_solvers_that_call_more_often(scheduler: type, tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "float")
    found = blueprint.read(str(tmp_path / "float"))
    real = sampling.timesteps(pipe, sampling.Request(4, (1,), ("a",), size=16))
    assert found.timesteps(Settings(steps=4)) == pytest.approx(real, abs=1e-3)


@pytest.mark.parametrize(("guidance", "branches"), [(None, 2), (1.0, 1), (3.0, 2)])
def test_guidance_doubles_the_calls(guidance: float | None, branches: int, tmp_path: Path) -> None:
    tiny_pipelines.stable_diffusion(tmp_path).save_pretrained(tmp_path / "float")
    assert blueprint.read(str(tmp_path / "float")).branches(Settings(guidance=guidance)) == branches


@pytest.mark.parametrize("name", ["unet2d", "unet-text", "dit", "flux"])
def test_multiply_adds_are_those_that_torch_counts(name: str) -> None:
    model = tiny.model(name)
    network = work.Network(adapt(model))
    # The counter knows attention as matrix products only.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**ARCHITECTURES[type(model)].example(model, 2))
    whole = network.whole.forward
    assert 2 * 2 * (whole.conv + whole.product) == pytest.approx(
        counter.get_total_flops(), rel=1e-6
    )
    temporal = {layer for unit in network.temporal for layer in unit.layers}
    units = sum((part.forward for part in network.by_unit.values()), work.Work())
    served = sum(
        network.node_work(node).product for node in network.graph.nodes if node.target in temporal
    )
    assert units.conv + units.product + served == pytest.approx(
        whole.conv + whole.product, rel=1e-9
    )


@cache
def folder_of(name: str, pipeline: str, home: str, place: Path) -> str:
    """A pipeline folder with configurations and nothing else."""
    kind, config = CONFIGS[name]
    with torch.device("meta"):
        kind(**config).save_config(place / home)
    EulerDiscreteScheduler().save_pretrained(place / "scheduler")
    index = {
        "_class_name": pipeline,
        home: ["diffusers", kind.__name__],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    (place / "model_index.json").write_text(json.dumps(index))
    return str(place)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of("sdxl", "StableDiffusionXLPipeline", "unet", tmp_path_factory.mktemp("sdxl"))


def test_sdxl_at_full_size_in_seconds_and_without_weights(sdxl: str) -> None:
    started = time.process_time()
    found = estimate.predict(sdxl, method="tfmq", fit="1.5GB")
    assert time.process_time() - started < 30
    assert found["float_bytes"] == pytest.approx(4 * 2567.5e6, rel=1e-3)
    assert found["weights"] == 4 and list(found["fit"]["tried"]) == [8, 6, 4]
    assert 0.5 < found["size"]["total"] / 2567.5e6 < 0.52
    assert found["memory"]["weights"] == found["float_bytes"]
    assert not list(Path(sdxl).rglob("*.safetensors"))


def test_a_hub_id_fetches_configurations_only(sdxl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(
        blueprint,
        "snapshot_download",
        lambda source, **options: asked.update(options, source=source) or sdxl,
    )
    assert blueprint.read("stabilityai/sdxl").pipeline == "StableDiffusionXLPipeline"
    assert asked["source"] == "stabilityai/sdxl"
    assert all(pattern.endswith(".json") for pattern in asked["allow_patterns"])


@pytest.fixture
def digits(tmp_path: Path) -> str:
    tiny.unet2d().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.usefixtures("steady")
def test_fit_takes_the_most_bits_that_fit(digits: str) -> None:
    whole = {
        bits: estimate.predict(digits, weights=bits)["size"]["total"] for bits in estimate.FITTING
    }
    assert sorted(whole.values(), reverse=True) == list(whole.values())
    for bits, total in whole.items():
        found = estimate.predict(digits, fit=str(total))
        assert found["weights"] == bits and found["size"]["total"] == total
    with pytest.raises(BadInput, match=f"expected at least {whole[2]:,}, which 2-bit"):
        estimate.predict(digits, fit=str(whole[2] - 1))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("500 MB", 500_000_000),
        ("1.5g", 1_500_000_000),
        ("123456", 123456),
        ("2kib", 2048),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert estimate.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "lots", "4 XB", "-1GB", "0", "4,5GB", "1e9", "GiB", "4GiB more", "٤GB"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(
        BadInput, match=r"found size .*; expected a number and a unit.*; mend --fit"
    ):
        estimate.parse_size(text)


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("method", METHODS)
def test_every_stage_has_a_price(method: str, digits: str) -> None:
    found = estimate.predict(digits, method=method, range_iters=5)
    assert found["unpriced"] == []
    free = {stage["name"] for stage in found["stages"] if stage["seconds"] == 0}
    assert free <= {"Assign", "TRD", "NDTC", "Split", "FSC"}
    assert found["peak_bytes"] == max(stage["peak_bytes"] for stage in found["stages"])


@pytest.mark.usefixtures("steady")
def test_time_follows_what_is_asked_for(digits: str) -> None:
    def seconds(**options: int) -> dict[str, float]:
        return {
            stage["name"]: stage["seconds"]
            for stage in estimate.predict(digits, **options)["stages"]
        }

    base, longer, wider = seconds(iters=1000), seconds(iters=3000), seconds(iters=1000, images=64)
    assert longer["TIAR"] == pytest.approx(3 * base["TIAR"], rel=0.01)
    assert 2.5 < longer["Reconstruct"] / base["Reconstruct"] < 3
    assert wider["Collect"] == pytest.approx(2 * base["Collect"], rel=0.01)


@pytest.mark.usefixtures("steady")
def test_a_stage_left_out_costs_nothing(digits: str) -> None:
    assert "TIAR" not in {
        stage["name"] for stage in estimate.predict(digits, without=("tiar",))["stages"]
    }


def test_probes_measure_this_machine() -> None:
    network = work.Network(adapt(tiny.unet2d()))
    found = speed.measured(network)
    seconds = asdict(found)
    assert all(
        each > 0
        for each in (*seconds.pop("full").values(), *seconds.pop("low").values(), *seconds.values())
    )
    assert 1e-13 < found.full.linear < 1e-8 and found.full.conv_back > found.full.conv / 10
    full = replace(found.full, conv=2 * found.full.conv, linear=2 * found.full.linear)
    twice = replace(found, full=full, value=2 * found.value, call=2 * found.call)
    assert twice.forward(network.whole.forward) == pytest.approx(
        2 * found.forward(network.whole.forward)
    )


MID = """
import json, sys
from lowtide import run
options = {"steps": 4, "images": 8, "calibration_steps": 4, "iters": 2, "batch": 16, "memory": 32 << 20}
found = to_folder.quantize_to_folder(sys.argv[1], sys.argv[2], sys.argv[3], options)
print(json.dumps({name: found[name] for name in ("predicted", "peak_bytes", "on_disk")}))
"""


@pytest.mark.parametrize("method", ["tfmq", "minmax"])
def test_predicted_peak_is_near_the_real_one(method: str, tmp_path: Path) -> None:
    tiny.unet2d(
        sample_size=32, block_out_channels=(128, 256), attention_head_dim=32
    ).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", MID, str(tmp_path / "model"), str(tmp_path / "out"), method]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    assert 0.5 <= found["predicted"]["peak_bytes"] / found["peak_bytes"] <= 2
    assert found["predicted"]["on_disk"] == pytest.approx(found["on_disk"], rel=0.01)
