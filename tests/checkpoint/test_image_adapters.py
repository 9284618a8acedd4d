"""IP-Adapters on a packed UNet: loaded, scaled, removed; not saved and not quantized."""

import numpy as np
import pytest
import torch
from more_pipelines import add_ip_adapter, embeddings, text_to_image

import lowtide
from lowtide.errors import BadInput
from lowtide.nn.attention import QuantAttention

OPTIONS = {"method": "minmax", "steps": 2, "images": 2, "size": 16, "prompts": ("a",)}


@pytest.fixture
def pipe(tmp_path):
    return lowtide.quantize(text_to_image(tmp_path), **OPTIONS).pipe


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    common = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    return pipe("a", generator=generator, **common, **options).images


def rounded(pipe):
    attentions = [each for each in pipe.unet.modules() if isinstance(each, QuantAttention)]
    return sum(each.active for each in attentions)


def test_an_adapter_is_loaded_and_removed(pipe):
    before = draw(pipe)
    count = rounded(pipe)
    add_ip_adapter(pipe.unet)
    assert rounded(pipe) == count > 0
    images = [
        draw(pipe, ip_adapter_image_embeds=[embeddings(2, 1, 32, seed=seed)]) for seed in (0, 3)
    ]
    assert abs(images[0] - images[1]).max() > 0.05
    pipe.set_ip_adapter_scale(0.0)
    unscaled = draw(pipe, ip_adapter_image_embeds=[embeddings(2, 1, 32)])
    assert abs(unscaled - before).max() < 1e-4
    pipe.unload_ip_adapter()
    assert rounded(pipe) == count
    assert np.linalg.norm(draw(pipe) - before) < 1e-4 * np.linalg.norm(before)


def test_an_adapter_is_not_saved(pipe, tmp_path):
    add_ip_adapter(pipe.unet)
    with pytest.raises(BadInput, match=r"with an IP-Adapter; .* call unload_ip_adapter\(\), save"):
        lowtide.save(pipe, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_an_adapter_is_not_quantized(tmp_path):
    pipe = text_to_image(tmp_path)
    add_ip_adapter(pipe.unet)
    with pytest.raises(BadInput, match=r"with an IP-Adapter; .* unload_ip_adapter\(\), quantize"):
        lowtide.quantize(pipe, **OPTIONS)
