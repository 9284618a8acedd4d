"""Terminal text: whole tables, literal names, what each stage learnt, and a quiet bar."""

import io

from rich.console import Console

from lowtide.report import text
from lowtide.report.progress import track
from lowtide.report.tables import table

RESULT = {
    "model": "zoo:digits",
    "method": "tfmq",
    "folder": "out",
    "weights": 4,
    "inputs": 8,
    "float_bytes": 4_000_000,
    "on_disk": 1_000_000,
    "minutes": 1.5,
    "timesteps": 20,
    "seconds": {"Collect": 6.1, "Reconstruct": 31.9, "LearnRanges": 2.0, "Pack": 0.1},
    "summaries": {
        "Collect": "40 calls recorded",
        "Reconstruct": "rounding of 3 blocks learnt",
        "LearnRanges": "input ranges of 1 block learnt",
        "Pack": "codes of 12 layers packed",
    },
    "losses": {
        "Reconstruct conv_in": [1.0, 0.5],
        "Reconstruct mid_block": [1.0, 0.25],
        "Reconstruct conv_out": [0.0, 0.0],
        "LearnRanges conv_in": [1.0, 1.2],
    },
    "account": {"codes": 900_000},
    "kernels": {"plain torch": 12},
    "float_share": 0.02,
    "float": {"norm": "not a matrix", "norm2": "not a matrix"},
}


def test_a_quantization_says_what_was_learnt() -> None:
    lines = text.quantized(RESULT)
    page = "\n".join(lines)
    assert "zoo:digits is quantized by tfmq: weights of 4 bits, inputs of 8 bits (W4A8)." in page
    assert "4.00 MB of float32 weights -> 1.00 MB on disk (0.250x), in 1 min 30 s" in page
    stages = {line.split()[0]: line for line in lines if line.split()}
    assert stages["Collect"].endswith("40 calls recorded")
    learnt = "rounding of 3 blocks learnt: kept 2 of 3, error 62 % lower (median)"
    assert learnt in stages["Reconstruct"]
    unchanged = "input ranges of 1 block learnt: none was better than before"
    assert unchanged in stages["LearnRanges"]
    assert stages["Pack"].endswith("codes of 12 layers packed")
    assert "12 layers run by the kernel: plain torch" in page
    assert "not a matrix: 2" in page and "norm, norm2" in page


def test_tables_show_every_letter() -> None:
    """Long cells are whole, square brackets are no markup, and numbers align to the right."""
    long = "layer" * 60
    head, rule, first, second = table(["a", "b [x]"], [["1", "[bold]"], [long, "2"]], right=True)
    assert set(rule) == {"─"} and head.split() == ["a", "b", "[x]"]
    assert first.endswith("[bold]") and second == f"{long}{'2':>9}"
    narrow = table(["a"], [["many words in a cell"]], width=12)
    assert max(map(len, narrow)) <= 12
    assert " ".join(narrow[2:]).split() == ["many", "words", "in", "a", "cell"]


def test_the_bar_passes_everything_on_and_is_quiet_in_a_file() -> None:
    stream = io.StringIO()
    items = track(iter(range(5)), total=5, title="five", console=Console(file=stream))
    assert list(items) == [0, 1, 2, 3, 4] and stream.getvalue() == ""
    terminal = Console(file=stream, force_terminal=True)
    assert list(track([1, 2], total=None, title="two", console=terminal)) == [1, 2]
    assert "two" in stream.getvalue()
