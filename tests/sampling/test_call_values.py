"""More arguments of a pipeline's call: by seed, pictures by path, files, refusals, records."""

import json

import more_pipelines as more
import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.sampling.call_files import read_call
from lowtide.sampling.call_values import call_values, recorded
from lowtide.settings import settings_from

SMALL = {"steps": 2, "prompts": ("a b", "x y"), "size": 16}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return more.text_to_image(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def from_picture(tmp_path_factory):
    return more.img2img(tmp_path_factory.mktemp("img2img"))


def request(**fields):
    return sampling.Request(**SMALL | {"seeds": (3, 4, 6)} | fields)


def test_what_an_image_has_is_assigned_by_seed(pipe):
    call = {"negative_prompt": ["p", "q"], "prompt_embeds": torch.arange(4).reshape(2, 2)}
    values = call_values(pipe, request(prompts=(), call=call))
    assert values["negative_prompt"] == ["q", "p", "p"]
    assert values["prompt_embeds"].tolist() == [[2, 3], [0, 1], [0, 1]]
    one = call_values(pipe, request(call={"negative_prompt": "p", "timesteps": [9, 5]}))
    assert one == {"negative_prompt": ["p", "p", "p"], "timesteps": [9, 5]}


def test_a_negative_prompt_reaches_the_denoiser(pipe):
    texts = []
    for words in ("p", "q q q"):
        call = {"negative_prompt": words, "guidance_scale": 3.0}
        moment = next(sampling.trajectory(pipe, request(call=call)))
        texts.append(moment.arguments["encoder_hidden_states"])
    negative, positive = texts[0].chunk(2)
    other, same = texts[1].chunk(2)
    assert torch.equal(positive, same) and not torch.equal(negative, other)


def test_paths_of_pictures_become_pictures(from_picture, tmp_path):
    paths = [str(tmp_path / f"{shade}.png") for shade in (0, 80)]
    for path, shade in zip(paths, (0, 80), strict=True):
        more.picture(shade).save(path)
    by_path = request(size=None, call={"image": paths, "strength": 0.5})
    given = request(size=None, call={"image": [more.picture(0), more.picture(80)], "strength": 0.5})
    images = [sampling.images(from_picture, each) for each in (by_path, given)]
    assert np.array_equal(*images)
    assert call_values(from_picture, by_path)["image"][0].getpixel((0, 0)) == (250, 80, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"negativ": "p"}, "found negativ in call, which a StableDiffusionPipeline does not take"),
        ({"generator": 3}, "found generator in call.* set seeds instead"),
        ({"num_inference_steps": 3}, "set steps instead"),
        ({"output_type": "pil"}, "leave it out"),
        ({"negative_prompt": []}, "found no negative_prompt in call"),
        ({"ip_adapter_image": "nowhere.png"}, "nowhere.png in call unreadable"),
        ({"prompt": "p"}, "found prompts, and prompt in call; expected one of them"),
        ({"height": 16}, "found size, and height in call"),
        ({"callback_on_step_end": print}, "arguments that lowtide does not set"),
        ({"clip_skip": "many"}, "found that a StableDiffusionPipeline fails on its arguments"),
    ],
)
def test_a_wrong_argument_is_one_sentence(pipe, call, message):
    with pytest.raises(BadInput, match=message):
        sampling.images(pipe, request(call=call))


@pytest.mark.parametrize("call", [3, "blurry", ["blurry"], {3: 4}])
def test_a_call_is_arguments_by_name(call):
    with pytest.raises(BadInput, match="expected arguments by name, such as"):
        settings_from({"call": call})


def test_guidance_that_a_pipeline_does_not_take_is_one_sentence(tmp_path):
    with pytest.raises(BadInput, match="found guidance for a DDIMPipeline"):
        sampling.images(tiny_pipelines.ddim(tmp_path), sampling.Request(steps=2, guidance=2.0))


def test_a_picture_that_is_missing_is_asked_for(tmp_path):
    pipe = more.upscale(tmp_path)
    with pytest.raises(BadInput, match=r"give or correct them with call=.* or --call FILE"):
        sampling.images(pipe, sampling.Request(steps=2, prompts=("a",)))


def test_a_file_of_arguments(tmp_path):
    more.picture().save(tmp_path / "cat.png")
    (tmp_path / "call.yaml").write_text("image: [cat.png]\nnegative_prompt: blurry\n")
    expected = {"image": [str(tmp_path / "cat.png")], "negative_prompt": "blurry"}
    assert read_call(tmp_path / "call.yaml") == expected
    (tmp_path / "call.json").write_text(json.dumps({"image": "cat.png", "strength": 0.5}))
    expected = {"image": str(tmp_path / "cat.png"), "strength": 0.5}
    assert read_call(tmp_path / "call.json") == expected


@pytest.mark.parametrize("text", ["{", "[1]", "3", "", '{"a": 1', "\x00"])
def test_a_file_without_arguments_is_one_sentence(tmp_path, text):
    for name in ("call.json", "call.yaml"):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInput):
            read_call(tmp_path / name)


def test_equal_values_are_recorded_alike():
    texts = [json.dumps(more.picture(shade), default=recorded) for shade in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    texts = [json.dumps(torch.full((2,), value), default=recorded) for value in (0.0, 0.0, 1.0)]
    assert texts[0] == texts[1] != texts[2]


def test_what_a_record_does_not_hold_is_asked_for_again(from_picture, tmp_path):
    original = from_picture.save_pretrained(tmp_path / "float") or str(tmp_path / "float")
    call = {"image": more.picture(), "strength": 0.5}
    options = {"steps": 2, "images": 2, "prompts": ("a",)}
    quantized = lowtide.quantize(original, method="minmax", call=call, **options)
    folder = quantized.save(tmp_path / "packed")
    with pytest.raises(BadInput, match=r"no image for the call: .*RGB.*; give call again"):
        lowtide.evaluate(folder, seeds=(0,))
    path = tmp_path / "cat.png"
    more.picture().save(path)
    result = lowtide.evaluate(folder, seeds=(0,), call={"image": str(path), "strength": 0.5})
    assert result.evidence.models["minmax-w4a8"].psnr > 10


def test_a_video_is_drawn_and_not_evaluated(tmp_path):
    pipe = more.text_to_video(tmp_path)
    pipe.save_pretrained(tmp_path / "float")
    call = {"num_frames": 3}
    images = sampling.images(pipe, request(seeds=(1, 2), call=call))
    assert images.shape == (2, 3, 16, 16, 3)
    with pytest.raises(BadInput, match=r"which draws no images .3 x 16 x 16 x 3"):
        lowtide.compare(pipe, str(tmp_path / "float"), out=tmp_path / "out", call=call, **SMALL)


def test_a_class_embedding_of_a_timestep_is_one_sentence():
    torch.manual_seed(0)
    model = tiny.unet2d(class_embed_type="timestep")
    assert isinstance(model, UNet2DModel)
    pipe = DDIMPipeline(model, DDIMScheduler())
    with pytest.raises(BadInput, match=r"fails on its arguments .class_labels should be provided"):
        lowtide.quantize(pipe, method="minmax", steps=2, images=2)
