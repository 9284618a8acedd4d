"""Every kind of pipeline in the papers' tables: from float to packed, saved, loaded, sampled."""

import inspect

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import (
    DDIMScheduler,
    LDMTextToImagePipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    VQModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.evaluation.metrics import psnr
from lowtide.sampling.class_embedder import ClassEmbedder
from lowtide.sampling.pipelines import ClassConditionalPipeline, UnconditionalPipeline

CLASSES = 5
OPTIONS = {"steps": 3, "images": 2, "iters": 2, "calibration_steps": 2, "inputs": 8}
TEXT = {"prompts": ("a b c", "x y z"), "size": 16}


def vq():
    torch.manual_seed(0)
    return VQModel(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        num_vq_embeddings=16,
    ).eval()


def labelled_latents(decoder):
    torch.manual_seed(0)
    return ClassConditionalPipeline(
        tiny.model("unet-text"),
        DDIMScheduler(clip_sample=False),
        null_label=CLASSES - 1,
        vae=decoder,
        class_embedder=ClassEmbedder(CLASSES, 32).eval(),
    )


def unconditional_latents(folder):
    unet = tiny.unet2d(in_channels=4, out_channels=4)
    return UnconditionalPipeline(unet.eval(), DDIMScheduler(), vae=tiny_pipelines.vae())


def text_to_image_ldm(folder):
    """The text encoder of the released model is a BERT of diffusers' own; here it is CLIP's."""
    torch.manual_seed(0)
    config = tiny_pipelines.clip().config.to_dict() | {"max_position_embeddings": 77}
    return LDMTextToImagePipeline(
        tiny_pipelines.vae(),
        CLIPTextModel(CLIPTextConfig(**config)).eval(),
        tiny_pipelines.clip_tokenizer(folder),
        tiny.model("unet-text"),
        DDIMScheduler(clip_sample=False),
    )


def pictured(kind, channels=4):
    def build(folder):
        parts = tiny_pipelines.stable_diffusion(folder).components
        torch.manual_seed(0)
        parts["unet"] = tiny.unet_condition(in_channels=channels).eval()
        return kind(**parts, requires_safety_checker=False)

    return build


KINDS = {
    "class-vq": (lambda folder: labelled_latents(vq()), {"labels": (0, 3), "guidance": 3.0}),
    "class-kl": (
        lambda folder: labelled_latents(tiny_pipelines.vae()),
        {"labels": (0, 3), "guidance": 1.0},
    ),
    "ldm": (tiny_pipelines.ldm, {}),
    "ldm-any": (unconditional_latents, {}),
    "ldm-text": (text_to_image_ldm, {"prompts": ("a b", "x y"), "size": 64, "guidance": 2.0}),
    "dit": (tiny_pipelines.dit, {"labels": (1, 3)}),
    "sd": (tiny_pipelines.stable_diffusion, TEXT),
    "sdxl": (tiny_pipelines.sdxl, TEXT),
    "img2img": (pictured(StableDiffusionImg2ImgPipeline), TEXT),
    "inpaint": (pictured(StableDiffusionInpaintPipeline), TEXT),
    "inpaint-9": (pictured(StableDiffusionInpaintPipeline, channels=9), TEXT),
}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        generator = np.random.default_rng(number)
        noise = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return str(folder)


CASES = [
    *((kind, method) for kind in KINDS for method in ("minmax", "tfmq")),
    *((kind, "best") for kind in ("class-vq", "ldm-text", "inpaint-9")),
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_from_float_to_packed(kind, method, tmp_path, pictures):
    build, fields = KINDS[kind]
    if "paint" in kind or kind == "img2img":
        fields = fields | {"pictures": pictures}
    pipe = build(tmp_path)
    request = sampling.Request(steps=3, seeds=(4, 5), **fields)
    original = sampling.images(pipe, request)
    options = OPTIONS | ({} if method != "minmax" else {"iters": 1000, "calibration_steps": 25})
    result = lowtide.quantize(pipe, method=method, weights=8, **options | fields)
    drawn = sampling.images(result.pipe, request)
    error = np.linalg.norm(drawn - original) / np.linalg.norm(original)
    assert 0 < error < 0.3
    again = lowtide.load(result.save(tmp_path / "packed"))
    assert type(again) is type(pipe)
    assert np.array_equal(sampling.images(again, request), drawn)


@torch.no_grad()
def test_the_condition_is_the_embedders_token_and_vq_decodes():
    """A plain loop: one call for the label and one for the null label, and the decoder."""
    pipe = labelled_latents(vq())
    request = sampling.Request(steps=3, seeds=(4, 5), labels=(0, 3), guidance=3.0)
    found = sampling.images(pipe, request)
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=one) for one in generators(4, 5)])
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(3)
    table = pipe.class_embedder.embedding.weight
    for t in scheduler.timesteps:
        with_label = pipe.unet(x, t, table[[0, 3]][:, None]).sample
        without = pipe.unet(x, t, table[[4, 4]][:, None]).sample
        x = scheduler.step(without + 3.0 * (with_label - without), t, x).prev_sample
    image = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    expected = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_labels_beyond_the_table_are_refused():
    pipe = labelled_latents(vq())
    with pytest.raises(BadInput, match="found label 5; expected 0 to 4"):
        sampling.images(pipe, sampling.Request(steps=2, labels=(5,)))


@pytest.mark.parametrize(("name", "table"), [("unet-text", False), ("unet-class", True)])
def test_a_unet_and_its_embedder_must_fit(name, table):
    embedder = ClassEmbedder(CLASSES, 32) if table else None
    with pytest.raises(BadInput, match="class_embedder; expected a UNet2DConditionModel with one"):
        ClassConditionalPipeline(tiny.model(name), DDIMScheduler(), class_embedder=embedder)


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_image_pipelines_are_built_around_a_packed_unet(kind, tmp_path):
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    # With inputs in float no rounding can turn to the other side, as a last digit may make it do.
    packed = lowtide.quantize(pipe, method="best", **OPTIONS | TEXT | {"weights": 8, "inputs": 16})
    other = kind(**packed.pipe.components, requires_safety_checker=False)
    call = {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    if kind is StableDiffusionInpaintPipeline:
        call["mask_image"] = torch.ones(1, 1, 16, 16)
    for strength in (1.0, 0.7):
        common = {"prompt": "a b", "num_inference_steps": 3, "output_type": "np"}
        options = common | call | {"strength": strength, "generator": generators(1)}
        fast = other(**options).images
        with lowtide.unfused(packed):
            plain = other(**options | {"generator": generators(1)}).images
        assert np.isfinite(fast).all()
        assert psnr(fast, plain) > 80


def test_pictures_and_masks_belong_to_seeds(tmp_path, pictures):
    pipe = pictured(StableDiffusionInpaintPipeline, channels=9)(tmp_path)
    options = {"steps": 2, "pictures": pictures} | TEXT
    together = sampling.images(pipe, sampling.Request(seeds=(0, 1, 2), batch=3, **options))
    alone = sampling.images(pipe, sampling.Request(seeds=(1,), **options))
    assert np.linalg.norm(together[1] - alone[0]) < 1e-4 * np.linalg.norm(alone[0])
    moment = next(sampling.trajectory(pipe, sampling.Request(seeds=(0, 1), **options)))
    masks = moment.arguments["sample"][:2, 4]
    assert 0 < masks.mean() < 1 and not torch.equal(masks[0], masks[1])


WRONG = [
    ("img2img", {}, "found a pipeline that starts from a picture, and no pictures"),
    ("img2img", {"pictures": "nowhere"}, "found no pictures in nowhere"),
    ("sd", {"pictures": "nowhere"}, "found pictures for a StableDiffusionPipeline"),
    ("ldm", {"pictures": "nowhere"}, "found pictures for a LDMPipeline"),
]


@pytest.mark.parametrize(("kind", "options", "message"), WRONG, ids=str)
def test_wrong_pictures_are_one_sentence(kind, options, message, tmp_path):
    build, fields = KINDS[kind]
    with pytest.raises(BadInput, match=message):
        sampling.images(build(tmp_path), sampling.Request(steps=2, **fields, **options))


class MyText(StableDiffusionPipeline):
    """A subclass of a pipeline that lowtide knows."""


class MyOwn:
    """A pipeline class of one's own, which calls the denoiser as diffusers' do."""

    def __init__(self, unet, scheduler):
        self.unet = unet
        self.scheduler = scheduler

    @torch.no_grad()
    def __call__(self, batch_size, num_inference_steps, generator, output_type):
        x = torch.cat([torch.randn(1, 3, 8, 8, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return type("Result", (), {"images": images})


def test_a_pipeline_of_ones_own_works(tmp_path):
    own = MyOwn(tiny.model("unet2d"), DDIMScheduler())
    result = lowtide.quantize(own, method="tfmq", **OPTIONS)
    assert sampling.images(result.pipe, sampling.Request(steps=3)).shape == (1, 8, 8, 3)
    text = MyText(**tiny_pipelines.stable_diffusion(tmp_path).components)
    result = lowtide.quantize(text, method="minmax", steps=3, images=2, **TEXT)
    assert sampling.images(result.pipe, sampling.Request(steps=3, **TEXT)).shape == (1, 16, 16, 3)


class Lacking(MyOwn):
    def __call__(self, batch_size, steps, generator, output_type):
        """It takes no num_inference_steps."""


def test_a_pipeline_that_cannot_be_called_says_what_is_missing():
    own = Lacking(tiny.model("unet2d"), DDIMScheduler())
    with pytest.raises(BadInput, match="found a Lacking whose call takes no num_inference_steps"):
        lowtide.quantize(own, method="minmax", steps=2, images=2)


def test_every_driver_names_a_pipeline_that_exists():
    import diffusers

    own = vars(sampling.pipelines)
    for name in sampling.DRIVERS:
        assert name in own or inspect.isclass(getattr(diffusers, name))
