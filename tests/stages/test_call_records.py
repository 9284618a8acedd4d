"""Recorded calls survive a kill: a resumed run takes up the batches that were drawn."""

import pytest
import tiny_pipelines
import torch

import lowtide
from lowtide.models.trace import mapped
from lowtide.stages import collect
from lowtide.stages.call import Call
from lowtide.stages.call_records import calls_of, tensors_of
from lowtide.stages.records import read_record, write_record


def nested(step, text):
    return {
        "sample": torch.full((2, 3), float(step), dtype=torch.bfloat16),
        "timestep": torch.tensor([step, step]),
        "added": {"text": text, "sizes": [torch.zeros(0), None], "pair": (1, "two")},
        "return_dict": False,
        "scale": 0.5,
    }


def texts_of(tree):
    """What is in a tree, as texts."""
    found = []
    mapped(tree, lambda leaf: found.append(str(leaf)))
    return found


def test_calls_come_back_to_the_same_bits(tmp_path):
    text = torch.rand(2, 4).to(torch.float16)
    calls = [(step, Call(7 - step, nested(step, text), kept=False)) for step in range(3)]
    tensors = tensors_of(calls)
    assert tensors is not None
    path = tmp_path / "calls.safetensors"
    write_record(path, tensors)
    again = calls_of(read_record(path, pytest.fail) or {})
    assert [(index, call.timestep) for index, call in again] == [(0, 7), (1, 6), (2, 5)]
    first, *others = [call.arguments for _, call in again]
    assert all(each["added"]["text"] is first["added"]["text"] for each in others)
    for (_, before), after in zip(calls, [first, *others], strict=True):
        assert texts_of(after) == texts_of(before.arguments)
        assert after["sample"].dtype == torch.bfloat16


def test_what_is_no_plain_value_is_not_recorded():
    assert (
        tensors_of([(0, Call(1, {"sample": torch.zeros(1), "mask": {1, 2}}, kept=False))]) is None
    )


def test_a_killed_collection_goes_on_with_its_next_batch(tmp_path, monkeypatch):
    options = {"method": "minmax", "steps": 3, "images": 18}
    drawn: list[int] = []
    trajectory = collect.trajectory

    def stopping(pipe, request, **rest):
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(request.seeds[0])
        return trajectory(pipe, request, **rest)

    def run(folder=None):
        pipe = tiny_pipelines.stable_diffusion(tmp_path)
        result = lowtide.quantize(pipe, folder=folder, prompts=("a", "b"), **options)
        return result.model.state_dict()

    monkeypatch.setattr(collect, "trajectory", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    first = list(drawn)
    drawn.clear()
    resumed = run(tmp_path / "run")
    assert len(first) == len(drawn) == 1 and first != drawn
    monkeypatch.setattr(collect, "trajectory", trajectory)
    whole = run()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
