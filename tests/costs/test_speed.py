"""The speed of this machine: the probes measure it, and time follows it."""

import time
from dataclasses import asdict, replace

import pytest
import tiny

from lowtide.costs import Network, measured
from lowtide.models import adapt


def test_probes_measure_this_machine() -> None:
    network = Network(adapt(tiny.unet2d()))
    speed = measured(network, time.process_time)  # the machine may be busy
    seconds = asdict(speed)
    products = [*seconds.pop("full").values(), *seconds.pop("low").values()]
    assert all(each > 0 for each in (*products, *seconds.values()))
    assert 1e-13 < speed.full.linear < 1e-8 and speed.full.conv_back > speed.full.conv / 10
    full = replace(speed.full, conv=2 * speed.full.conv, linear=2 * speed.full.linear)
    half = replace(speed, full=full, value=2 * speed.value, call=2 * speed.call)
    work = network.whole.forward
    assert half.forward(work) == pytest.approx(2 * speed.forward(work))
