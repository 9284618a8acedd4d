"""A machine of known speed, and models to predict for."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler
from models.configs import CONFIGS

from lowtide.costs import Speed
from lowtide.costs.speed import Products
from lowtide.estimate import prediction


@pytest.fixture
def quiet_speed() -> Speed:
    """The speed of a machine that nothing else uses."""
    products = Products(conv=1e-11, conv_back=2e-11, linear=1e-11, linear_back=2e-11)
    return Speed(
        full=products,
        low=products,
        value=1e-10,
        value_back=1e-10,
        weight=1e-8,
        search=1e-7,
        call=1e-5,
        call_back=2e-5,
    )


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch, quiet_speed: Speed) -> None:
    """Predict for the quiet machine."""
    monkeypatch.setattr(prediction, "measured", lambda network: quiet_speed)


@pytest.fixture
def digits(tmp_path: Path) -> str:
    """A folder with a tiny UNet."""
    tiny.unet2d().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline folder with the configurations of SDXL at its full size and nothing else."""
    folder = tmp_path_factory.mktemp("sdxl")
    kind, config = CONFIGS["sdxl"]
    with torch.device("meta"):
        kind(**config).save_config(folder / "unet")
    EulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", kind.__name__],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)
