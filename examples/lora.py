"""Draw the figure of the guide: `python examples/lora.py RUN --picture FILE`.

RUN is zoo:emoji, quantized. Each row is one way to draw the same noise: float, float with the
LoRA of zoo/emoji-gold, packed with it, packed with it fused, and packed after it was unfused. The
numbers printed are relative L2 of the images of two rows.
"""

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

import lowtide
from lowtide import sampling, zoo

LORA = Path(__file__).parents[1] / "zoo" / "emoji-gold"
PROMPTS = ("crown", "penguin", "rocket", "cat face", "red apple", "octopus", "snowman", "heart")


def images(pipe: Any) -> np.ndarray:
    """One image of each prompt: (prompts, height, width, 3), 0 to 1."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    options = {"num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "np"}
    return pipe(list(PROMPTS), generator=generators, **options).images


def rows(run: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The name and the images of each row, in the order of the figure."""
    floating = sampling.load_pipeline(zoo.folder("emoji").as_posix())
    yield "float", images(floating)
    floating.load_lora_weights(LORA, adapter_name="gold")
    yield "float and LoRA", images(floating)
    packed = lowtide.load(run)
    before = images(packed)
    packed.load_lora_weights(LORA, adapter_name="gold")
    yield "packed and LoRA", images(packed)
    packed.fuse_lora()
    yield "packed, LoRA fused", images(packed)
    packed.unfuse_lora()
    packed.unload_lora_weights()
    after = images(packed)
    print(f"after unfusing, equal to before to the bit: {np.array_equal(before, after)}")
    yield "packed, unfused", after


def distance(drawn: dict[str, np.ndarray], one: str, other: str) -> str:
    error = np.linalg.norm(drawn[one] - drawn[other]) / np.linalg.norm(drawn[other])
    return f"{one}, against {other}: relative L2 {error:.2g}"


def draw(drawn: dict[str, np.ndarray], path: Path) -> None:
    figure, axes = plt.subplots(len(drawn), len(PROMPTS), figsize=(9.4, 5.6), dpi=110)
    for line, (name, pictures) in zip(axes, drawn.items(), strict=True):
        for place, picture in zip(line, pictures, strict=True):
            place.imshow(picture.clip(0, 1), interpolation="lanczos")
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
        label = textwrap.fill(name, 12)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, labelpad=10)
    for place, prompt in zip(axes[0], PROMPTS, strict=True):
        place.set_title(prompt, fontsize=10)
    figure.subplots_adjust(0.12, 0.01, 0.995, 0.94, 0.04, 0.04)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="zoo:emoji, quantized")
    parser.add_argument("--picture", type=Path, default=Path("docs/figures/lora.png"))
    options = parser.parse_args()
    drawn = dict(rows(options.run))
    draw(drawn, options.picture)
    print(distance(drawn, "packed and LoRA", "float and LoRA"))
    print(distance(drawn, "packed, unfused", "float"))
    print(distance(drawn, "packed, LoRA fused", "packed and LoRA"))


if __name__ == "__main__":
    main()
