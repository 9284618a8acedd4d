"""A plan for an accelerator: reckoned for a card that is not here, probed where one is."""

import pretend_device
import pytest
import torch

import lowtide
from lowtide.errors import BadInput
from lowtide.estimate.cards import CARDS
from lowtide.report import text

OPTIONS = {"method": "tfmq", "steps": 2, "images": 4, "iters": 100}


def ways(estimate) -> dict[tuple[int, str], object]:
    return {(way.bytes_of_a_weight, way.place): way for way in estimate.card.ways}


def test_sdxl_fits_a_card_of_16_gb(sdxl: str) -> None:
    """Block by block in half precision; not whole in float32."""
    estimate = lowtide.plan(sdxl, card="t4", dtype="bfloat16", place="blocks", **OPTIONS)
    found = ways(estimate)
    assert found[2, "blocks"].fits and found[2, "blocks"].parts_bytes < 16e9
    assert not found[4, "whole"].fits
    assert estimate.card.place == "blocks" and estimate.card.reckoned
    assert estimate.card.largest_unit == pytest.approx(47.5e6, rel=0.01)
    assert estimate.card.moving_seconds > 0


def test_half_precision_and_blocks_take_less(digits: str) -> None:
    found = ways(lowtide.plan(digits, card="t4", **OPTIONS))
    for width in (2, 4):
        assert found[width, "blocks"].peak_bytes < found[width, "whole"].peak_bytes
    for place in ("whole", "blocks"):
        assert found[2, place].peak_bytes < found[4, place].peak_bytes
    for way in found.values():
        assert way.parts_bytes <= way.peak_bytes


def test_a_faster_card_takes_less_time(sdxl: str) -> None:
    slow, fast = (lowtide.plan(sdxl, card=name, **OPTIONS).seconds for name in ("t4", "h200"))
    assert fast < slow / 2


def test_a_card_that_nobody_knows_is_refused(digits: str) -> None:
    with pytest.raises(BadInput, match="found card 'voodoo'"):
        lowtide.plan(digits, card="voodoo", **OPTIONS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_without_a_card_the_plan_says_which_one_it_assumes(digits: str) -> None:
    estimate = lowtide.plan(digits, device="cuda", **OPTIONS)
    assert estimate.card.assumed and estimate.card.name == CARDS["rtx4090"].name
    lines = "\n".join(text.estimated(estimate.as_json()))
    assert "by its data sheet, not measured" in lines
    assert "The run holds the model in float32, the whole denoiser" in lines


def test_an_accelerator_that_is_here_is_probed(digits: str) -> None:
    with pretend_device.present():
        estimate = lowtide.plan(digits, device="pretend", **OPTIONS)
    assert not estimate.card.reckoned and estimate.card.name == "pretend:0"
    assert estimate.seconds > 0 and estimate.card.memory > 1 << 40


def test_a_plan_for_the_cpu_has_no_card(digits: str) -> None:
    estimate = lowtide.plan(digits, device="cpu", **OPTIONS)
    assert estimate.card is None and "card" not in estimate.as_json()
