"""Triton kernels compiled for cards that are not there: instructions, registers, shared memory.

A subprocess compiles, because this process may have imported the interpreter's kernels.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from lowtide.kernels.triton.tiles import card_of

SCRIPT = Path(__file__).with_name("compile_triton.py")
CARDS = (90, 89, 80)
# In every run of the suite; the other cases are slow together.
CORE = {
    90: ("conv-w8a8", "conv-w4a8-320", "codes-w4a8", "linear-mixed", "attention-40", "skip-norm"),
    89: ("conv-w4a8",),
    80: ("conv-w8a8-320", "attention-40"),
}
NARROW = {90: "wgmma.mma_async m64n", 89: "mma m16n8k32.row.col", 80: "mma m16n8k32.row.col"}
FLOAT = {"linear-w8a16", "linear-w4a16"}
STREAMS = {"group-norm", "layer-norm", "rounding"}
MIXED = {"attention-adaptive"}


@cache
def compiled(capability: int, names: tuple[str, ...]) -> dict[str, list[dict]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, str(SCRIPT), str(capability), *names]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def check(capability: int, name: str, kernel: dict) -> None:
    shared = card_of(divmod(capability, 10)).shared
    assert kernel["spills"] == 0, kernel
    assert kernel["stack"] == 0, kernel
    assert kernel["shared"] <= shared, kernel
    multiplies = kernel["kernel"] in ("product", "float_product", "rounded_attention")
    assert bool(kernel["products"]) == multiplies, kernel
    if not multiplies:
        return
    # Operands come through cp.async while tensor cores work.
    assert kernel["copies"] > 0, kernel
    kinds = set(kernel["products"])
    integers = {kind for kind in kinds if "s32.s8.s8" in kind}
    assert all(kind.startswith(NARROW[capability]) for kind in integers), kernel
    if name in FLOAT:
        assert not integers, kernel
    elif name in MIXED:
        assert 0 < len(integers) < len(kinds), kernel
    else:
        assert integers == kinds, kernel


@pytest.mark.parametrize("capability", CARDS)
def test_kernels_use_the_int8_tensor_cores_without_spills(capability):
    results = compiled(capability, CORE[capability])
    assert set(results) == set(CORE[capability])
    for name, kernels in results.items():
        assert kernels
        for kernel in kernels:
            check(capability, name, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CARDS)
def test_all_kernels(capability):
    results = compiled(capability, ())
    assert len(results) > 15
    for name, kernels in results.items():
        for kernel in kernels:
            check(capability, name, kernel)
