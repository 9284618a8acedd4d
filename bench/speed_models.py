"""The speed of packed models against eager float32 and OpenVINO int8, one thread, random weights.

    python bench/speed_models.py [--models ddpm,dit,sd15] [--widths w8a8,w4a8] [--batches 1,8]
    python bench/speed_models.py --models zoo --against ""

ddpm: the UNet of DDPM on CIFAR-10, 35.7 million weights. dit: like DiT-S/2, 12 layers of 6 heads,
on latents of 32x32. sd15: the UNet of Stable Diffusion 1.5 on latents of 64x64; guidance doubles
its batch, and NNCF needs 14 GB for it. These get random weights. zoo: the trained models of the
zoo. Each is quantized by minmax with two steps, and measured by `lowtide bench speed`. Everything
is kept in runs/speed: an interrupted run continues, and a finished cell is measured again only
with --fresh.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lowtide.report.speed_tables import lines
from lowtide.workflows.method_ranks import lined
from lowtide.workflows.speed_bench.turns import SpeedOptions, measure_speed
from lowtide.workflows.to_folder import quantize_to_folder

HOME = Path(__file__).resolve().parents[1] / "runs" / "speed"
STEPS = 2
TOKENS = 77
Json = dict[str, Any]


def ddpm(folder: Path) -> DDIMPipeline:
    """google/ddpm-cifar10-32"""
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        norm_eps=1e-6,
    )
    return DDIMPipeline(unet, DDIMScheduler())


def dit(folder: Path) -> DiTPipeline:
    """12 layers of 6 heads of 64, patches of 2."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=12,
        sample_size=32,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer, vae(), DDIMScheduler())


def sd15(folder: Path) -> StableDiffusionPipeline:
    """The UNet of Stable Diffusion 1.5, with a text encoder and a decoder that take no time."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=768,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=12,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer(folder),
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def vae() -> AutoencoderKL:
    """The smallest decoder of latents an eighth as high and wide."""
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters only, no merges."""
    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{each}</w>" for each in letters)]
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({word: place for place, word in enumerate(words)}))
    merges = folder / "merges.txt"
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=TOKENS)


@dataclass(frozen=True)
class Model:
    """A model, what its calibration needs, its batches, and the steps that are worth their time.

    build: gives the model random weights; a model of the zoo needs none.
    """

    build: Callable[[Path], Any] | None
    options: Json
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 24


MODELS = {
    "ddpm": Model(ddpm, {}),
    # Without guidance, so that a batch of one is one sample.
    "dit": Model(dit, {"labels": (0,), "guidance": 1.0}),
    "sd15": Model(sd15, {"prompts": ("a lake",)}, (1,), 4),
    "zoo:digits": Model(None, {}),
    "zoo:digits-cond": Model(None, {"labels": (0,)}),
    "zoo:cifar10-small": Model(None, {}),
    "zoo:emoji": Model(None, {"prompts": ("rocket",)}),
    "zoo:dit": Model(None, {"labels": (0,)}),
}
ZOO = ",".join(name for name in MODELS if name.startswith("zoo:"))


def home(name: str) -> Path:
    """Where everything about a model is kept."""
    return HOME / name.replace(":", "-")


def float_source(name: str) -> str:
    """The model of the zoo, or a folder with random weights, made once."""
    build = MODELS[name].build
    if build is None:
        return name
    folder = home(name) / "float"
    if not (folder / "model_index.json").exists():
        say(f"{name}: random weights")
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        build(folder).save_pretrained(folder)
    return str(folder)


def packed_folder(name: str, width: str) -> Path:
    """The packed model; made once."""
    folder = home(name) / width
    if not (folder / "model_index.json").exists():
        say(f"{name}: quantizing to {width}")
        weights, inputs = (int(bits) for bits in width[1:].split("a"))
        options = {"weights": weights, "inputs": inputs, "steps": STEPS, "images": 1}
        quantize_to_folder(float_source(name), folder, "minmax", options | MODELS[name].options)
    return folder


def cell(name: str, width: str, batch: int, options: argparse.Namespace) -> Json:
    """One measurement, or the one that is kept."""
    path = home(name) / f"{width}-b{batch}-t{options.threads}.json"
    if options.fresh or not path.exists():
        folder = packed_folder(name, width)
        say(f"{name} {width}: {batch} at once")
        wanted = SpeedOptions(
            batch=batch,
            threads=options.threads,
            repeats=options.repeats or MODELS[name].repeats,
            against=tuple(filter(None, options.against.split(","))),
            floating=float_source(name),
            kept=home(name) / "peers",
        )
        path.write_text(json.dumps(measure_speed(str(folder), wanted), indent=1) + "\n")
    return json.loads(path.read_text())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


HEAD = [
    "model",
    "batch",
    "variant",
    "CPU a step",
    "x float",
    "x best OpenVINO",
    "memory",
    "first step",
]


def rows(name: str, width: str, result: Json) -> list[list[str]]:
    """A line for each variant; the packed model's says its width."""
    openvino = [row["cpu"] for row in result["rows"] if row["variant"].startswith("openvino")]
    lines = []
    for row in result["rows"]:
        title = f"lowtide {width.upper()}" if row["variant"] == "packed" else row["name"]
        best = f"{min(openvino) / row['cpu']:.2f}" if openvino else ""
        ratio = "" if row["ratio_cpu"] is None else f"{row['ratio_cpu']:.2f}"
        time = f"{1e3 * row['cpu']:.4g} ms"
        first = f"{row['until_first']:.1f} s"
        facts = [time, ratio, best, f"{row['memory'] / 1e6:.0f} MB", first]
        if row["variant"] != "plain":
            lines.append([name, str(result["batch"]), title, *facts])
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="ddpm,dit")
    parser.add_argument("--widths", default="w8a8,w4a8")
    parser.add_argument("--batches", default="", help="such as 1,8; a model's own if not given")
    parser.add_argument("--against", default="openvino")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="steps of every variant")
    parser.add_argument("--fresh", action="store_true", help="measure finished cells again")
    parser.add_argument("--parts", action="store_true", help="print each measurement in full too")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    table = [HEAD, ["---"] * len(HEAD)]
    models = ZOO if options.models == "zoo" else options.models
    for name in models.split(","):
        batches = map(int, filter(None, options.batches.split(",")))
        for batch in tuple(batches) or MODELS[name].batches:
            for width in options.widths.split(","):
                result = cell(name, width, batch, options)
                table += rows(name, width, result)
                if options.parts:
                    print("\n".join(lines(result)), "\n")
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}\n")
    print("\n".join(lined(table)))


if __name__ == "__main__":
    main()
