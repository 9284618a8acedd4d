"""Products are in bf16 where a measurement says that they are faster, not where units exist."""

import itertools

import pytest
import torch

from lowtide.machine import bf16

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten():
    bf16.time_in_bf16.cache_clear()
    yield
    bf16.time_in_bf16.cache_clear()


@pytest.mark.parametrize(
    ("ratio", "enabled"), [(0.4, True), (0.79, True), (0.81, False), (1.9, False)]
)
def test_one_measurement_decides(monkeypatch, ratio, enabled):
    ratios = iter([ratio, 1 / ratio])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(bf16, "measure_time_ratio", lambda: next(ratios))
    for _ in range(2):
        with bf16.bf16_products(CPU):
            assert torch.is_autocast_enabled("cpu") == enabled
        with bf16.bf16_products(CPU, wanted=False):
            assert not torch.is_autocast_enabled("cpu")
    assert bf16.describe_products(torch.zeros(1), low=enabled) == (
        "products in bf16"
        if enabled
        else f"products in float32: bf16 takes {ratio:.1f} x as long here"
    )
    assert (
        bf16.describe_products(torch.zeros(1, dtype=torch.float16), low=enabled)
        == "products in float16, the model's own"
    )


def test_without_units_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(bf16, "measure_time_ratio", lambda: pytest.fail("measured"))
    with bf16.bf16_products(CPU):
        assert not torch.is_autocast_enabled("cpu")
    assert bf16.describe_products(torch.zeros(1), low=False) == "products in float32"


def test_the_ratio_is_bf16_to_float32(monkeypatch):
    """On a simulated clock, a product takes one second in bf16 and four seconds in float32."""
    products = itertools.count()
    conv2d = torch.nn.functional.conv2d
    clock = [0.0]

    def slow(x, w, padding):
        next(products)
        clock[0] += 1.0 if torch.is_autocast_enabled("cpu") else 4.0
        return conv2d(x, w, padding=padding)

    monkeypatch.setattr(bf16.F, "conv2d", slow)
    monkeypatch.setattr(bf16.time, "process_time", lambda: clock[0])
    assert bf16.measure_time_ratio() == 0.25
    assert next(products) == 2 * (bf16.REPEATS + 1)


def test_this_machine_can_be_measured():
    assert 0 < bf16.measure_time_ratio() < 100
