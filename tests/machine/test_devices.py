"""Devices by name: what is there is found, and what is not is one sentence."""

import pretend_device
import pytest
import torch

from lowtide.errors import BadInput
from lowtide.machine import devices

HERE = torch.device("pretend", 0)


@pytest.fixture
def accelerator():
    with pretend_device.present():
        yield


@pytest.fixture
def alone(monkeypatch):
    """A machine without an accelerator, whatever this one has."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)


def test_auto_is_the_accelerator(accelerator) -> None:
    assert devices.chosen() == devices.chosen("auto") == HERE


def test_auto_is_the_cpu_without_one(alone) -> None:
    assert devices.chosen("auto") == devices.CPU


def test_auto_leaves_apples_gpu_alone(monkeypatch) -> None:
    apple = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: apple)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    assert devices.chosen("auto") == devices.CPU
    assert devices.chosen("mps") == torch.device("mps", 0)


@pytest.mark.parametrize("name", ["cpu", "pretend", "pretend:0", "pretend:1"])
def test_a_device_that_is_there_is_taken(name: str, accelerator) -> None:
    asked = torch.device(name)
    assert devices.chosen(name) == (HERE if name == "pretend" else asked)


@pytest.mark.parametrize("name", ["gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", " cpu"])
def test_a_name_that_no_device_has_is_refused(name: str, alone) -> None:
    with pytest.raises(BadInput, match=r"found device .*expected one of auto, cpu, cuda, mps, xpu"):
        devices.chosen(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "xpu:0"])
def test_a_device_that_is_not_there_is_refused(name: str, alone) -> None:
    with pytest.raises(BadInput, match=f"found device '{name}', and torch sees no .*expected cpu;"):
        devices.chosen(name)


def test_another_accelerator_than_the_one_there_is_refused(accelerator) -> None:
    with pytest.raises(BadInput, match=r"torch sees no cuda .*expected cpu or pretend"):
        devices.chosen("cuda")


def test_a_number_beyond_the_cards_is_refused(accelerator) -> None:
    with pytest.raises(BadInput, match=r"'pretend:2' on a machine with 2 cards; .* from 0 to 1"):
        devices.chosen("pretend:2")


def test_devices_are_described_and_waited_for(accelerator) -> None:
    for device in (devices.CPU, HERE):
        assert devices.describe(device) == str(device)
        devices.synchronize(device)
