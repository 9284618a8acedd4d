"""Numbers in words: significant figures, sizes and durations."""

import pytest

from lowtide.report import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123, "0.0123"),
        (26.158, "26.2"),
        (1234.6, "1,235"),
        (4e-7, "4.00·10⁻⁷"),
        (0, "0"),
        (float("inf"), "∞"),
        (float("nan"), "–"),
    ],
)
def test_figures(value: float, text: str) -> None:
    assert wording.figures(value) == text


def test_numbers_in_words() -> None:
    sizes = [wording.size(count) for count in (4_449_636, 661_340, 2.567e9, 212.7e6, 8_000)]
    assert sizes == ["4.45 MB", "0.661 MB", "2.57 GB", "213 MB", "8.00 kB"]
    lasting = [wording.lasting(value) for value in (6.1, 49.44, 59.97, 61.7, 3600, 7325, 2e6, 1e9)]
    words = ["6.1 s", "49.4 s", "1 min", "1 min 2 s", "1 h 0 min", "2 h 2 min", "23.1 days"]
    assert lasting == [*words, "32 years"]
    rounds = {
        "5.00 MB": "5 MB",
        "2.50 GB": "2.5 GB",
        "100 MB": "100 MB",
        "35.00": "35",
        "0.02": "0.02",
    }
    assert [wording.brief(text) for text in rounds] == list(rounds.values())


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("temporal:time_embedding.linear_1", "time"),
        ("down_blocks.1.resnets.0", "down 1"),
        ("time_embedding.linear_1", "time"),
        ("down_blocks.1.resnets.0.time_emb_proj", "down 1"),
        ("mid_block.attentions.0", "mid"),
        ("conv_in", "in"),
        ("transformer_blocks.12", "transformer 12"),
        ("proj_out", "proj out"),
    ],
)
def test_layers_have_short_names(layer: str, name: str) -> None:
    assert wording.part_name(layer) == name
