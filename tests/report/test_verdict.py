"""The verdict in the terminal: every model a column, and failed gates as sentences."""

from lowtide.report import verdict

EVIDENCE = {
    "title": "a beside b",
    "report": "x/report.html",
    "reference": "b",
    "models": {
        "b": {"name": "b [float]", "bytes": 4_000_000, "seconds_per_step": 0.02, "metrics": {}},
        "a": {
            "name": "a",
            "bytes": 1_000_000,
            "seconds_per_step": 0.03,
            "metrics": {
                "psnr": {"value": 25.4321, "low": 24.0, "high": 27.0},
                "odd": {"value": None},
            },
            "trajectory": {"error": [0.1, 0.25]},
        },
    },
    "gates": [
        {"name": "min-psnr", "model": "a", "limit": 30.0, "value": 25.4321, "passed": False},
        {"name": "max-fd-increase", "model": "a", "limit": 1.0, "value": None, "passed": False},
        {"name": "max-lpips", "model": "a", "limit": 0.2, "value": 0.1, "passed": True},
    ],
}


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
        "x/report.html",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 200


def test_failures_are_sentences():
    assert verdict.failures(EVIDENCE) == [
        "gate failed: a: PSNR 25.43, at least 30 asked",
        "gate failed: a: FD increase no number, at most 1 asked",
    ]
