"""Training a zoo model: a killed run resumes to the same weights, and what is exported loads as a pipeline."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

from lowtide import zoo
from lowtide.errors import BadInput
from lowtide.zoo import train
from lowtide.zoo.train import Trainer


def small_model():
    return tiny.unet2d(sample_size=32, in_channels=1, out_channels=1, block_out_channels=(8, 8), attention_head_dim=8)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setitem(train.SPECS, "digits", replace(train.SPECS["digits"], model=small_model, batch=4, steps=6))
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    (tmp_path / "mnist").mkdir()
    np.savez(tmp_path / "mnist" / "mnist.npz", train_x=images)
    return tmp_path


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.average.parameters()])


def test_a_killed_run_resumes_to_the_same_weights(data):
    whole = Trainer("digits", data, data / "whole")
    whole.train(minutes=10)
    first = Trainer("digits", data, data / "killed")
    for _ in range(3):
        first.advance()
    first.save()
    second = Trainer("digits", data, data / "killed")
    second.resume()
    assert second.step == 3
    second.train(minutes=10)
    assert second.step == whole.step == 6
    assert torch.equal(weights(second), weights(whole))


def test_the_average_moves_and_the_loss_is_of_noise(data):
    trainer = Trainer("digits", data, data / "run")
    before = weights(trainer)
    losses = [trainer.advance() for _ in range(6)]
    assert 0.5 < np.mean(losses) < 2.0  # an untrained model cannot tell noise of variance 1
    assert 0 < (weights(trainer) - before).norm() / before.norm() < 0.2


def test_what_is_exported_is_a_pipeline_with_a_card(data):
    trainer = Trainer("digits", data, data / "run")
    trainer.train(minutes=10)
    train.export(trainer, data / "digits")
    pipe = DiffusionPipeline.from_pretrained(data / "digits")
    assert type(pipe).__name__ == "DDIMPipeline"
    assert "6 steps of 4 images" in (data / "digits" / "README.md").read_text()
    halves = weights(trainer).half().float()
    assert torch.equal(torch.cat([parameter.detach().flatten() for parameter in pipe.unet.parameters()]), halves)


def test_the_shipped_model_is_small_and_known():
    assert "digits" in zoo.names()
    shipped = sum(path.stat().st_size for path in zoo.folder("digits").rglob("*.safetensors"))
    assert shipped <= 6_000_000
    with pytest.raises(BadInput, match="no zoo model called 'dogs'; expected one of digits"):
        zoo.folder("dogs")
