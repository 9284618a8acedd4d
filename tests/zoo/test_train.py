"""Training a zoo model: a killed run resumes to the same weights; its export loads and draws."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import tiny_zoo
import torch
from diffusers import AutoencoderTiny, UNet2DModel

import train
from lowtide import sampling, zoo
from training import pixels
from training.batches import random_flags
from training.catalogue import ZOO_MODELS
from training.export import export, image_grid, loss_table, model_folder
from training.trainer import Trainer

LABELS = {"digits-cond": (3, 7), "dit": (3, 7)}
PROMPTS = {"emoji": ("thing 3",)}
PIPELINES = {
    "emoji": "StableDiffusionPipeline",
    "dit": "DiTPipeline",
    "digits-cond": "ClassConditionalPipeline",
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    return tiny_zoo.build(tmp_path, monkeypatch)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.average.parameters()])


@pytest.mark.parametrize("name", ZOO_MODELS)
def test_a_killed_run_resumes_to_the_same_weights(name, data):
    whole = Trainer(name, data, data / "whole")
    start = weights(whole)
    whole.train(minutes=10)
    first = Trainer(name, data, data / "killed")
    for _ in range(2):
        first.advance()
    first.save()
    second = Trainer(name, data, data / "killed")
    second.resume()
    assert second.step == 2
    second.train(minutes=10)
    assert second.step == whole.step == tiny_zoo.STEPS
    assert torch.equal(weights(second), weights(whole))
    assert 0 < (weights(whole) - start).norm() / start.norm() < 0.2


@pytest.mark.parametrize("name", [name for name in ZOO_MODELS if name != "emoji-vae"])
def test_an_export_loads_and_draws_from_the_same_weights(name, data):
    trainer = Trainer(name, data, data / "run")
    trainer.train(minutes=10)
    export(trainer, model_folder(name))
    pipe = sampling.load_pipeline(f"zoo:{name}")
    assert type(pipe).__name__ == PIPELINES.get(name, "DDIMPipeline")
    labels = LABELS.get(name, ())
    prompts = PROMPTS.get(name, ())
    request = sampling.Request(steps=2, seeds=(0, 1), labels=labels, prompts=prompts)
    images = sampling.images(pipe, request)
    assert images.shape[0] == 2
    assert images.std() > 0.01
    for part, module in trainer.average.items():
        state = getattr(pipe, part).state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(state[key], value.half().float()), key
    card = (zoo.folder(name) / "README.md").read_text()
    assert f"Trained by `python zoo/train.py {name}`" in card
    assert f"{tiny_zoo.STEPS} steps of {tiny_zoo.BATCH} images" in card
    assert trainer.task.data in card
    assert (zoo.folder(name) / "loss.png").stat().st_size > 1000


def test_the_autoencoder_exports_as_a_model(data):
    trainer = Trainer("emoji-vae", data, data / "run")
    trainer.train(minutes=10)
    export(trainer, model_folder("emoji-vae"))
    vae = AutoencoderTiny.from_pretrained(zoo.folder("emoji-vae"))
    trained = trainer.average["vae"].encoder.layers[0].weight
    assert torch.equal(vae.encoder.layers[0].weight, trained.half().float())
    assert "emoji-vae" not in zoo.names()


def test_an_untrained_model_cannot_predict_noise_of_variance_one(data):
    trainer = Trainer("cifar10", data, data / "run")
    assert 0.3 < np.mean([trainer.advance().item() for _ in range(4)]) < 2.0


def test_the_checkpoint_keeps_its_names(data):
    trainer = Trainer("digits", data, data / "run")
    trainer.save()
    state = torch.load(trainer.checkpoint, weights_only=True)
    assert set(state) == {"model", "average", "optimizer", "step", "losses"}
    assert all(name.startswith("unet.") for name in state["model"])


def test_compiled_parts_learn_the_same_under_the_same_names(data, monkeypatch):
    """Traced but not translated: this tests the graph and needs no C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = Trainer("digits", data, data / "plain")
    compiled = Trainer("digits", data, data / "compiled", compiled=True)
    assert compiled.model["unet"]._compiled_call_impl is not None
    assert plain.model["unet"]._compiled_call_impl is None
    for _ in range(2):
        assert plain.advance().item() == compiled.advance().item()
    assert torch.equal(weights(plain), weights(compiled))
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())


def test_class_conditional_digits_start_as_digits_whatever_the_label(data):
    model = pixels.class_conditional_digits_model()
    path = zoo.folder("digits") / "unet"
    start = UNet2DModel.from_pretrained(path, dtype=torch.float32)
    x = torch.randn(3, 1, 32, 32)
    t = torch.tensor([5, 500, 900])
    with torch.no_grad():
        conditional = model(x, t, class_labels=torch.tensor([0, 9, 10])).sample
        unconditional = start(x, t).sample
    error = (conditional - unconditional).norm() / unconditional.norm()
    assert error.item() < 1e-6
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in start.state_dict().items())


def test_every_block_of_the_transformer_gets_the_same_label(data):
    model = tiny_zoo.transformer().train()
    x = torch.randn(64, 32, 8, 8)
    t = torch.full((64,), 500)
    labels = torch.arange(64) % 10
    torch.manual_seed(0)
    first = model(x, timestep=t, class_labels=labels).sample
    assert torch.equal(first, model(x, timestep=t, class_labels=labels).sample)


def test_conditions_are_dropped_one_time_in_ten():
    dropped = random_flags(pixels.LABEL_DROPOUT, torch.Generator().manual_seed(0), 10_000)
    assert abs(dropped.float().mean() - 0.1) < 0.01


def test_cifar10_is_read_whole_and_half_of_it_mirrored(data, monkeypatch):
    task = pixels.Cifar10(data, pixels.cifar10_model)
    assert task.images.shape == (20, 3, 32, 32)
    batches = []
    monkeypatch.setattr(pixels, "noise_loss", lambda predict, clean, *rest: batches.append(clean))
    task.loss(task.parts, torch.Generator().manual_seed(0), 400, None)
    [clean] = batches
    originals = task.images.float() / 127.5 - 1
    as_is = (clean[:, None] == originals).flatten(2).all(2).any(1)
    mirrored = (clean.flip(-1)[:, None] == originals).flatten(2).all(2).any(1)
    assert (as_is ^ mirrored).all()
    assert 0.4 < mirrored.float().mean() < 0.6


def test_a_data_folder_without_cifar10_is_an_error_that_says_so(tmp_path):
    with pytest.raises(Exception, match="CIFAR-10 in strips; name the folder with --data"):
        pixels.cifar10(tmp_path)


def test_the_grid_has_eight_in_a_row(data):
    images = np.zeros((16, 32, 32, 1))
    images[9] = 1  # second row, second column
    grid = np.asarray(image_grid(images))
    assert grid.shape == (128, 512)
    assert (grid[64:, 64:128] == 255).all()
    assert grid.sum() == 255 * 64 * 64


def test_the_table_of_losses_is_short_and_ends_at_the_last_step():
    losses = [[step, 1 / step] for step in range(250, 25_250, 250)]
    rows = loss_table(losses).splitlines()[2:]
    assert len(rows) <= 12
    assert rows[-1].startswith("| 25000 |")


def test_one_command_trains_and_exports(data, monkeypatch, capsys):
    out = data / "out"
    command = ["train.py", "cifar10-small", "--data", str(data), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--minutes", "9"])
    train.main()
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads(last_line)["step"] == tiny_zoo.STEPS
    assert "cifar10-small" in zoo.names()
