"""Training a zoo model: a killed run resumes to the same weights, and what is exported loads and draws."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
import world
from diffusers import AutoencoderTiny, UNet2DModel

from lowtide import sample, zoo
from lowtide.zoo import pixels, train
from lowtide.zoo.export import export, loss_table, sheet
from lowtide.zoo.noise import happens
from lowtide.zoo.specs import SPECS
from lowtide.zoo.trainer import Trainer

LABELS = {"digits-cond": (3, 7), "dit": (3, 7)}
KINDS = {"emoji": "StableDiffusionPipeline", "dit": "DiTPipeline", "digits-cond": "ClassConditionalPipeline"}


@pytest.fixture
def data(tmp_path, monkeypatch):
    return world.build(tmp_path, monkeypatch)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.average.parameters()])


@pytest.mark.parametrize("name", SPECS)
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
    assert second.step == whole.step == world.STEPS
    assert torch.equal(weights(second), weights(whole))
    assert 0 < (weights(whole) - start).norm() / start.norm() < 0.2


@pytest.mark.parametrize("name", [name for name in SPECS if name != "emoji-vae"])
def test_what_is_exported_loads_and_draws_from_the_same_weights(name, data):
    trainer = Trainer(name, data, data / "run")
    trainer.train(minutes=10)
    export(trainer, zoo.home(name))
    pipe = sample.load_pipeline(f"zoo:{name}")
    assert type(pipe).__name__ == KINDS.get(name, "DDIMPipeline")
    prompts = ("thing 3",) if name == "emoji" else ()
    request = sample.Request(steps=2, seeds=(0, 1), labels=LABELS.get(name, ()), prompts=prompts)
    images = sample.images(pipe, request)
    assert images.shape[0] == 2 and images.std() > 0.01
    for part, module in trainer.average.items():
        state = getattr(pipe, part).state_dict()
        assert all(torch.equal(state[key], value.half().float()) for key, value in module.state_dict().items())
    card = (zoo.folder(name) / "README.md").read_text()
    assert f"{world.STEPS} steps of {world.BATCH} images" in card and trainer.task.data in card
    assert (zoo.folder(name) / "loss.png").stat().st_size > 1000


def test_the_autoencoder_exports_as_a_model(data):
    trainer = Trainer("emoji-vae", data, data / "run")
    trainer.train(minutes=10)
    export(trainer, zoo.home("emoji-vae"))
    vae = AutoencoderTiny.from_pretrained(zoo.folder("emoji-vae"))
    assert torch.equal(vae.encoder.layers[0].weight, trainer.average["vae"].encoder.layers[0].weight.half().float())
    assert "emoji-vae" not in zoo.names()


def test_an_untrained_model_cannot_tell_noise_of_variance_one(data):
    trainer = Trainer("cifar10", data, data / "run")
    assert 0.3 < np.mean([trainer.advance().item() for _ in range(4)]) < 2.0


def test_the_checkpoint_keeps_its_names(data):
    trainer = Trainer("digits", data, data / "run")
    trainer.save()
    state = torch.load(trainer.checkpoint, weights_only=True)
    assert set(state) == {"model", "average", "optimizer", "step", "losses"}
    assert all(name.startswith("unet.") for name in state["model"])


def test_compiled_parts_learn_the_same_under_the_same_names(data, monkeypatch):
    """Traced but not translated: the graph is what can go wrong here, and it needs no C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, compiled = Trainer("digits", data, data / "plain"), Trainer("digits", data, data / "compiled", compiled=True)
    assert compiled.model["unet"]._compiled_call_impl is not None and plain.model["unet"]._compiled_call_impl is None
    assert [plain.advance().item() for _ in range(2)] == [compiled.advance().item() for _ in range(2)]
    assert torch.equal(weights(plain), weights(compiled))
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())


def test_labelled_digits_start_as_digits_whatever_the_label(data):
    model = pixels.labelled_digits_model()
    start = UNet2DModel.from_pretrained(zoo.folder("digits") / "unet", dtype=torch.float32)
    x, t = torch.randn(3, 1, 32, 32), torch.tensor([5, 500, 900])
    with torch.no_grad():
        told, untold = model(x, t, class_labels=torch.tensor([0, 9, 10])).sample, start(x, t).sample
    assert ((told - untold).norm() / untold.norm()).item() < 1e-6
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in start.state_dict().items())


def test_the_transformer_is_told_the_same_label_in_every_block(data):
    model = world.transformer().train()
    x, t, labels = torch.randn(64, 32, 8, 8), torch.full((64,), 500), torch.arange(64) % 10
    torch.manual_seed(0)
    first = model(x, timestep=t, class_labels=labels).sample
    assert torch.equal(first, model(x, timestep=t, class_labels=labels).sample)


def test_conditions_are_left_out_one_time_in_ten():
    dropped = happens(pixels.DROPPED, torch.Generator().manual_seed(0), 10_000)
    assert abs(dropped.float().mean() - 0.1) < 0.01


def test_cifar_is_read_whole_and_half_of_it_mirrored(data, monkeypatch):
    task = pixels.Cifar(data, pixels.cifar_model)
    assert task.images.shape == (20, 3, 32, 32)
    seen = []
    monkeypatch.setattr(pixels, "noise_loss", lambda predict, clean, *rest: seen.append(clean))
    task.loss(task.parts, torch.Generator().manual_seed(0), 400, None)
    originals = task.images.float() / 127.5 - 1
    as_is = (seen[0][:, None] == originals).flatten(2).all(2).any(1)
    mirrored = (seen[0].flip(-1)[:, None] == originals).flatten(2).all(2).any(1)
    assert (as_is ^ mirrored).all()
    assert 0.4 < mirrored.float().mean() < 0.6


def test_a_data_folder_without_cifar_says_so(tmp_path):
    with pytest.raises(Exception, match="CIFAR-10 in strips; name the folder with --data"):
        pixels.cifar(tmp_path)


def test_the_grid_has_eight_in_a_row(data):
    images = np.zeros((16, 32, 32, 1))
    images[9] = 1  # second row, second place
    grid = np.asarray(sheet(images))
    assert grid.shape == (128, 512)
    assert (grid[64:, 64:128] == 255).all() and grid.sum() == 255 * 64 * 64


def test_the_table_of_losses_is_short_and_ends_at_the_end():
    rows = loss_table([[step, 1 / step] for step in range(250, 25_250, 250)]).splitlines()[2:]
    assert len(rows) <= 12 and rows[-1].startswith("| 25000 |")


def test_one_command_trains_and_exports(data, monkeypatch, capsys):
    out = data / "out"
    monkeypatch.setattr(sys, "argv", ["train", "cifar10-small", "--data", str(data), "--out", str(out), "--minutes", "9"])
    train.main()
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["step"] == world.STEPS
    assert "cifar10-small" in zoo.names()
