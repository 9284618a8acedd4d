"""Any module may be imported first: the hook runs while diffusers is only half imported."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "lowtide.checkpoint.file_format",
        "lowtide.models",
        "lowtide.stages.pack",
    ],
)
def test_it_can_come_first(module):
    lines = [
        f"import {module}",
        "from diffusers.quantizers import auto",
        "auto.AUTO_QUANTIZER_MAPPING['lowtide']",
    ]
    code = "; ".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
