"""The short form of `make fuzz`: random changes of headers, plans, indexes and configurations."""

import json
import random
import time
from contextlib import nullcontext

import pytest
from faulty import fuzz

from lowtide.checkpoint import seal
from lowtide.errors import BadInput

SEEDS = fuzz.seeds()
COUNT = 150  # of each seed
SECONDS = 5


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_nothing_but_one_sentence_is_said(seed, tmp_path):
    """Each change is made on the one before, so that some go further than one field."""
    rng = random.Random(seed)
    data = SEEDS[seed]
    for number in range(COUNT):
        data = fuzz.mutated(SEEDS[seed] if number % 4 == 0 else data, rng)
        began = time.process_time()
        try:
            fuzz.attempt(data, tmp_path)
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error}\n{data!r:.3000}")
        assert time.process_time() - began < SECONDS


@pytest.mark.parametrize("number", [number for number in range(len(SEEDS)) if number != 1])
def test_a_seed_is_whole(number, tmp_path):
    """But for the plan with something in each field, which fits no network."""
    seed = SEEDS[number]
    fuzz.TARGETS[seed[0]](seed[1:], tmp_path)


LONG = "9" * 400


def _with(**changes: object) -> bytes:
    return json.dumps(json.loads(fuzz.some_plan().to_json()) | changes).encode()


# Inputs that once raised something else, and what they are.
FINDINGS = {
    "a header that json reads and safetensors does not": b"\0"
    + fuzz.header_bytes({"__metadata__": {"lowtide_plan": "", "lowtide_hashes": "\ud800"}}),
    "a plan without a field that it needs": b'\1{"layers": {}, "attentions": {}, "timesteps": [], '
    b'"ticks": 1, "kinds": [], "left": {}, "cached": {}}',
    "a time that no float holds": fuzz.seeds()[1].replace(b"999.25", LONG.encode()),
    "features of requests without a width": b"\1"
    + _with(requests={"a": {"reads": ["x"], "cache": None, "exact": None}}),
    "a name that is too long for a file": b'\2{"_class_name": "A", "%s": []}' % LONG.encode(),
    "a field that no version knows": b'\3{"quantization_config": {"weight": 4}}',
}


@pytest.mark.parametrize("what", FINDINGS)
def test_a_finding_is_one_sentence_now(what, tmp_path):
    data = FINDINGS[what]
    with pytest.raises(BadInput) if data[0] != 2 else nullcontext():
        fuzz.TARGETS[data[0]](data[1:], tmp_path)


def test_weights_beside_a_configuration_that_is_no_json(tmp_path):
    header, room = SEEDS[0][1:], tmp_path
    header = header.replace(seal.OPEN.encode(), seal.OPEN.replace("0", "1").encode())
    (room / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config.json in .* that is no JSON"):
        fuzz.read_header(header, room)


def test_other_exceptions_are_findings(tmp_path, monkeypatch):
    def fail(content, room):
        raise KeyError("layers")

    monkeypatch.setattr(fuzz, "TARGETS", (fail,))
    with pytest.raises(KeyError):
        fuzz.attempt(b"\0", tmp_path)
