"""The verdict in the terminal: every model a column, and failed gates as sentences."""

import math

from lowtide.report import verdict
from lowtide.report.evidence import (
    Environment,
    Evidence,
    GateResult,
    Measurement,
    Model,
    Sampling,
    TrajectoryErrors,
)

ENVIRONMENT = Environment(python="3", torch="2", diffusers="0", lowtide="0", cpu="x", threads=1)
ORIGIN = {"n": 2, "higher_is_better": True, "backend": "lowtide", "resize": "none", "seeds": "0-1"}
LIMITS = [("min-psnr", 30.0, 25.4321), ("max-fd-increase", 1.0, math.nan), ("max-lpips", 0.2, 0.1)]
EVIDENCE = Evidence(
    title="a beside b",
    command="",
    date="",
    environment=ENVIRONMENT,
    request=Sampling(seeds=(0, 1), steps=2, batch=2, scheduler="DDIMScheduler"),
    reference="b",
    models={
        "b": Model(
            name="b [float]", source="", kind="float", bytes=4_000_000, seconds_per_step=0.02
        ),
        "a": Model(
            name="a",
            source="",
            kind="lowtide",
            bytes=1_000_000,
            seconds_per_step=0.03,
            metrics={
                "psnr": Measurement(value=25.4321, low=24.0, high=27.0, **ORIGIN),
                "odd": Measurement(value=math.nan, **ORIGIN),
            },
            trajectory=TrajectoryErrors([1, 0], [0.1, 0.25]),
        ),
    },
    gates=[
        GateResult(name=name, model="a", limit=limit, value=value, passed=name == "max-lpips")
        for name, limit, value in LIMITS
    ],
)


def test_numbers_and_ratios():
    text = "\n".join(verdict.lines(EVIDENCE))
    for words in (
        "b [float]",
        "4.00 MB",
        "1.00 MB",
        "0.25x",
        "1.50x",
        "25.43",
        "24 to 27",
        "0.25",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 200


def test_failures_are_sentences():
    assert verdict.failures(EVIDENCE) == [
        "gate failed: a: PSNR 25.43, at least 30 required",
        "gate failed: a: FD increase no number, at most 1 required",
    ]
