"""The estimate: it fits a limit, follows the settings, and is near what a real run takes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from lowtide import estimate
from lowtide.errors import BadInput
from lowtide.estimate import prediction
from lowtide.methods import METHODS, relevant_options


def test_sdxl_at_full_size_in_seconds_and_without_weights(sdxl: str) -> None:
    started = time.process_time()
    result = estimate.plan(sdxl, method="tfmq", fit="1.5GB")
    assert time.process_time() - started < 30
    assert result.float_bytes == pytest.approx(4 * 2567.5e6, rel=1e-3)
    assert result.weights == 4 and list(result.fit.tried) == [8, 6, 4]
    assert 0.5 < result.size["total"] / 2567.5e6 < 0.52
    assert result.memory.weights == result.float_bytes
    assert not list(Path(sdxl).rglob("*.safetensors"))


@pytest.mark.usefixtures("steady")
def test_fit_takes_the_most_bits_that_fit(digits: str) -> None:
    whole = {bits: estimate.plan(digits, weights=bits).size["total"] for bits in prediction.FITTING}
    assert sorted(whole.values(), reverse=True) == list(whole.values())
    for bits, total in whole.items():
        result = estimate.plan(digits, fit=str(total))
        assert result.weights == bits and result.size["total"] == total
    with pytest.raises(BadInput, match=f"expected at least {whole[2]:,}, which 2-bit"):
        estimate.plan(digits, fit=str(whole[2] - 1))


KEYS = [
    "model", "method", "weights", "inputs", "options", "fit", "size", "float_bytes", "stages",
    "seconds", "peak_bytes", "memory", "others", "unpriced", "speed", "predicted_in",
]  # fmt: skip


@pytest.mark.usefixtures("steady")
def test_an_estimate_as_json_has_the_keys_of_the_report(digits: str) -> None:
    result = estimate.plan(digits, fit="1GB", stages={"omq": {"plus": True}})
    data = result.as_json()
    assert list(data) == KEYS
    assert data["options"] == {"omq": {"plus": True}}
    assert data["fit"] == {"limit": 10**9, "weights": 8, "tried": {8: data["size"]["total"]}}
    assert set(data["memory"]) == {"weights", "calls", "tape"}
    assert [set(stage) for stage in data["stages"]] == [
        {"name", "seconds", "peak_bytes"} for _ in result.stages
    ]
    again = json.loads(json.dumps(data))
    assert again | {"fit": data["fit"]} == data  # JSON has no whole numbers as keys
    assert "fit" not in estimate.plan(digits).as_json()


@pytest.mark.usefixtures("steady")
def test_totals_are_those_of_the_estimate(digits: str) -> None:
    result = estimate.plan(digits, method="tfmq", iters=100_000)
    totals = result.totals()
    assert totals["on_disk"] == result.size["total"]
    assert totals["peak_bytes"] == result.peak_bytes
    assert totals["minutes"] == pytest.approx(result.seconds / 60, abs=0.01)
    assert sum(totals["seconds"].values()) == pytest.approx(result.seconds, abs=0.1)


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
    assert prediction.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "lots", "4 XB", "-1GB", "0", "4,5GB", "1e9", "GiB", "4GiB more", "٤GB"]
)
def test_sizes_that_are_none(text: str) -> None:
    message = r"found size .*; expected a number and a unit.*; correct --fit"
    with pytest.raises(BadInput, match=message):
        prediction.parse_size(text)


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("method", METHODS)
def test_every_stage_has_a_price(method: str, digits: str) -> None:
    result = estimate.plan(digits, method=method, **relevant_options(method, {"range_iters": 5}))
    assert result.unpriced == ()
    free = {stage.name for stage in result.stages if stage.seconds == 0}
    assert free <= {"Assign", "TRD", "NDTC", "Split", "FSC"}
    assert result.peak_bytes == max(stage.peak_bytes for stage in result.stages)


@pytest.mark.usefixtures("steady")
def test_time_follows_the_settings(digits: str) -> None:
    def seconds(**options: int) -> dict[str, float]:
        return estimate.plan(digits, **options).totals()["seconds"]

    base = seconds(iters=1000)
    longer = seconds(iters=3000)
    wider = seconds(iters=1000, images=64)
    assert longer["TIAR"] == pytest.approx(3 * base["TIAR"], rel=0.01)
    assert 2.5 < longer["Reconstruct"] / base["Reconstruct"] < 3
    assert wider["Collect"] == pytest.approx(2 * base["Collect"], rel=0.01)


@pytest.mark.usefixtures("steady")
def test_a_stage_left_out_costs_nothing(digits: str) -> None:
    stages = estimate.plan(digits, without=("tiar",)).stages
    assert "TIAR" not in {stage.name for stage in stages}


MID = """
import json, sys
from lowtide.methods import relevant_options
from lowtide.workflows import to_folder
options = {"steps": 4, "images": 8, "calibration_steps": 4, "iters": 2, "batch": 16}
options["memory"] = 32 << 20
options = relevant_options(sys.argv[3], options)
result = to_folder.quantize_to_folder(sys.argv[1], sys.argv[2], sys.argv[3], options)
print(json.dumps({name: result[name] for name in ("predicted", "peak_bytes", "on_disk")}))
"""


@pytest.mark.parametrize("method", [pytest.param("tfmq", marks=pytest.mark.slow), "minmax"])
def test_predicted_peak_is_near_the_real_one(method: str, tmp_path: Path) -> None:
    model = tiny.unet2d(sample_size=32, block_out_channels=(128, 256), attention_head_dim=32)
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", MID, str(tmp_path / "model"), str(tmp_path / "out"), method]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(ended.stdout.splitlines()[-1])
    assert 0.5 <= result["predicted"]["peak_bytes"] / result["peak_bytes"] <= 2
    assert result["predicted"]["on_disk"] == pytest.approx(result["on_disk"], rel=0.01)
