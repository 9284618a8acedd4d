"""Scores: wrong metrics are refused before any sampling."""

import pytest

from lowtide.errors import BadInput
from lowtide.evaluation.gates import evaluation_settings
from lowtide.evaluation.metrics.metric_definitions import METRICS
from lowtide.evaluation.metrics.metric_names import INCEPTION_NAMES, extractor_of
from lowtide.evaluation.scores import LATENT, PAIRS, WITHOUT_REFERENCE, measurement_plan
from lowtide.settings import DATASET_METRIC_NAMES, METRIC_NAMES


def plan(metrics, dataset, gates):
    return measurement_plan(evaluation_settings(gates, dataset=dataset, metrics=metrics))


def test_default_metrics():
    default = plan(None, None, {})
    assert default.pair_metrics() == ["psnr", "ssim"]
    assert default.set_metrics() == []
    assert "latent_mse" in default.metrics
    assert not default.explicit


def test_a_gate_adds_its_metric():
    assert plan(["ssim"], None, {"min-psnr": 20.0}).pair_metrics() == ["ssim", "psnr"]


@pytest.mark.parametrize(
    ("metrics", "dataset", "gates", "words"),
    [
        (["beauty"], None, {}, "found metric 'beauty'"),
        (["fd"], None, {}, "found fd and no data set"),
        (None, None, {"max-fd-increase": 1.0}, "found fd and no data set"),
        (["precision"], "nowhere", {}, "found nothing at nowhere"),
        (None, None, {"min-ssim": 0.9}, "found gate 'min-ssim'"),
        (["fid", "fd-efficientnet"], "nowhere", {}, "fd-efficientnet"),
    ],
)
def test_wrong_metrics(metrics, dataset, gates, words):
    with pytest.raises(BadInput, match=words):
        plan(metrics, dataset, gates)


def test_the_names_of_the_settings_are_those_that_can_be_computed():
    computed = {*METRICS, *INCEPTION_NAMES.values(), LATENT}
    assert {*METRIC_NAMES, *DATASET_METRIC_NAMES} == computed
    with pytest.raises(BadInput) as error:
        plan(["beauty"], None, {})
    assert error.value.expected == f"one of {', '.join((*METRIC_NAMES, *DATASET_METRIC_NAMES))}"
    assert set(METRIC_NAMES) == {*PAIRS, *WITHOUT_REFERENCE, LATENT}


def test_the_extractor_of_a_name():
    names = {
        "fid": "inception",
        "is": "inception",
        "fd-dinov2": "dinov2",
        "kd-efficientnet": "efficientnet",
        "fd": None,
        "psnr": None,
    }
    assert {name: extractor_of(name) for name in names} == names
