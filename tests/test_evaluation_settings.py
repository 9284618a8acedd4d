"""Settings of an evaluation: defaults, and one sentence for each wrong value."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowtide.errors import BadInput
from lowtide.evaluation.gates import evaluation_settings
from lowtide.settings import EvaluationSettings


def test_nothing_is_set():
    settings = evaluation_settings()
    assert settings == EvaluationSettings()
    assert settings.limits == {}
    assert settings.request_fields == {}


def test_arguments_of_evaluate_are_collected():
    gates = {"max-fd-increase": 1.0, "min-psnr": 25.0}
    settings = evaluation_settings(
        gates, dataset=Path("set"), seeds=range(3), labels=[1, 2], prompts=(), steps=5
    )
    assert settings.dataset == "set"
    assert settings.min_psnr == 25.0
    assert settings.limits == {"min-psnr": 25.0, "max-fd-increase": 1.0}
    assert settings.request_fields == {"seeds": (0, 1, 2), "steps": 5, "labels": (1, 2)}


BAD = [
    ({"gates": {"min-ssim": 0.9}}, "found gate 'min-ssim'"),
    ({"gates": {"min-psnr": float("nan")}}, "found min_psnr nan; expected a finite number"),
    ({"gates": {"max-lpips": float("inf")}}, "found max_lpips inf; expected a finite number"),
    ({"gates": {"max-fd-increase": float("-inf")}}, "found max_fd_increase -inf"),
    ({"gates": {"min-psnr": "25"}}, "found min_psnr '25'; expected a number"),
    ({"guidance": float("nan")}, "found guidance nan; expected a finite number"),
    ({"seeds": (0, 0)}, "found seed 0 twice; expected each seed once"),
    ({"seeds": [4, 7, 5, 7]}, "found seed 7 twice"),
    ({"seeds": ()}, "found no seeds; expected at least one"),
    ({"seeds": (0.5,)}, "found seeds (0.5,); expected a list, each a whole number"),
    ({"seeds": 3}, "found seeds 3; expected a list"),
    ({"steps": 0}, "found steps 0; expected a whole number at least 1"),
    ({"steps": "3"}, "found steps '3'"),
    ({"batch": 0}, "found batch 0"),
    ({"size": -8}, "found size -8"),
    ({"eta": 1.5}, "found eta 1.5"),
    ({"metrics": "psnr"}, "found metrics 'psnr'; expected a list, each a text"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_wrong_values(options, sentence):
    with pytest.raises(BadInput, match=re.escape(sentence)):
        evaluation_settings(**options)


def test_settings_need_no_torch():
    code = "import sys, lowtide.settings; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"
