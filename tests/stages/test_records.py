"""Records of finished work: whole or made anew, under the conditions of the run's start."""

import json
from dataclasses import replace

import pytest
import tiny
import tiny_pipelines
import torch

import lowtide
from lowtide import sampling
from lowtide.checkpoint.facts import digest_of_parts
from lowtide.errors import BadInput
from lowtide.machine import bf16
from lowtide.stages import conditions
from lowtide.stages.reconstruct import Learner
from lowtide.stages.records import read_record, write_record

CPU = torch.device("cpu")
TENSORS = {"codes": torch.arange(200, dtype=torch.uint8), "scale": torch.rand(7)}


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def emptied(path):
    path.write_bytes(b"")


def swapped(path):
    """The tensors of another record under this one's hash."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(TENSORS | {"scale": torch.rand(7)}, path, metadata=header)


def test_a_record_comes_back_as_it_was(tmp_path):
    path = tmp_path / "units" / "one.safetensors"
    assert read_record(path, pytest.fail) is None
    write_record(path, TENSORS)
    again = read_record(path, pytest.fail)
    assert again is not None and again.keys() == TENSORS.keys()
    assert all(torch.equal(again[name], TENSORS[name]) for name in TENSORS)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", [flipped, cut, emptied, swapped])
def test_a_damaged_record_is_thrown_away_with_one_line(tmp_path, damage):
    path = tmp_path / "one.safetensors"
    write_record(path, TENSORS)
    damage(path)
    lines: list[str] = []
    assert read_record(path, lines.append) is None
    assert lines == ["one.safetensors of the interrupted run is damaged; its work is done again"]
    assert not path.exists()


def run(folder, **changes):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    options = {"steps": 4, "images": 1, "calibration_steps": 1, "batch": 1, "iters": 3} | changes
    return lowtide.quantize(pipe, method="tfmq", folder=folder, **options).model.state_dict()


def test_a_run_with_a_damaged_record_ends_with_the_same_weights(tmp_path, capsys):
    first = run(tmp_path)
    records = sorted(tmp_path.glob("*/units/Reconstruct-*"))
    flipped(records[1])
    again = run(tmp_path)
    assert capsys.readouterr().err.count("is damaged") == 1
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert sorted(tmp_path.glob("*/units/Reconstruct-*")) == records


def test_a_resumed_run_keeps_to_the_precision_and_threads_of_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr(bf16, "pays", lambda kind: True)
    whole = run(None)
    search = Learner.search
    monkeypatch.setattr(Learner, "search", stopping_after(2, search))
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    seen: list[int] = []
    monkeypatch.setattr(bf16, "pays", lambda kind: False)
    monkeypatch.setattr(
        Learner,
        "search",
        lambda self, loss: seen.append(torch.get_num_threads()) or search(self, loss),
    )
    torch.set_num_threads(threads + 1)
    try:
        resumed = run(tmp_path)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {threads}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def stopping_after(count, search):
    left = iter(range(count))

    def searching(self, loss):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return search(self, loss)

    return searching


@pytest.mark.parametrize("name", ["torch", "kernels", "device"])
def test_a_run_that_began_elsewhere_is_not_mixed(tmp_path, name):
    begun = conditions.kept_to(tmp_path, CPU)
    assert not any(tmp_path.iterdir())
    conditions.keep(tmp_path, begun)
    conditions.keep(tmp_path, replace(begun, threads=999))
    assert conditions.kept_to(tmp_path, CPU) == begun
    other = replace(begun, **{name: "another"})
    path = tmp_path / conditions.FILE
    path.write_text(json.dumps(other.__dict__))
    with pytest.raises(BadInput, match=r"began with another .*go on where it began, or remove"):
        conditions.kept_to(tmp_path, CPU)
    path.write_text("{")
    assert conditions.kept_to(tmp_path, CPU) == begun


def test_the_digest_of_a_run_knows_every_part_and_its_configuration(tmp_path):
    def digest(change=lambda pipe: None):
        pipe = tiny_pipelines.stable_diffusion(tmp_path)
        change(pipe)
        return digest_of_parts(pipe)

    def other_betas(pipe):
        pipe.scheduler.register_to_config(beta_schedule="squaredcos_cap_v2")

    def other_norm(pipe):
        pipe.unet.register_to_config(norm_eps=1e-3)

    def other_text(pipe):
        next(pipe.text_encoder.parameters()).data.add_(1)

    def other_decoder(pipe):
        next(pipe.vae.parameters()).data.add_(1)

    changes = (other_betas, other_norm, other_text, other_decoder)
    assert digest() == digest()
    assert len({digest(), *map(digest, changes)}) == 1 + len(changes)
