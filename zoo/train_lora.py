"""Train the LoRA of the guide: `python zoo/train_lora.py` teaches zoo:emoji a style, gold.

The text encoder stays as it is, and no prompt names the style: with the LoRA, every prompt gives
it. Layers that read the timestep alone are left out, so that the LoRA also fits packed models that
hold their answers as tables. A run that ends early starts from the beginning.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor

from lowtide import zoo
from training.batches import random_indices
from training.emoji import NOISE_SCHEDULE, emoji
from training.objective import noise_loss
from training.phases import TrainingPhase

FOLDER = Path(__file__).parent / "emoji-gold"
RANK = 8
BATCH = 16
PHASE = TrainingPhase(600, 1e-3, (0, 600), snr_cap=5.0)
BRONZE = (104, 44, 16)
GOLD = (255, 200, 72)
IVORY = (255, 246, 206)
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
PROMPTS_SHOWN = (
    "rocket",
    "red apple",
    "cat face",
    "penguin",
    "heart",
    "crown",
    "octopus",
    "snowman",
)


def gilded(images: Tensor) -> Tensor:
    """The style: each shade of grey becomes a shade of gold; white stays white.

    images: (n, 3, height, width) in [-1, 1], on white; so is the result.
    """
    colours = torch.tensor([BRONZE, GOLD, IVORY]) / 127.5 - 1
    grey = images.mean(1, keepdim=True).clamp(-1, 1)
    low = colours[0].view(3, 1, 1)
    middle = colours[1].view(3, 1, 1)
    high = colours[2].view(3, 1, 1)
    dark = low + (grey + 1).clamp(max=1) * (middle - low)
    shaded = torch.where(grey < 0, dark, middle + grey.clamp(min=0) * (high - middle))
    whiteness = (images.min(1, keepdim=True).values - 0.6).clamp(0, 0.4) / 0.4
    return shaded + whiteness * (images - shaded)


@torch.no_grad()
def latents_of(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    parts = [pipe.vae.encode(part).latents for part in images.split(64)]
    return torch.cat(parts) * pipe.vae.config.scaling_factor


@torch.no_grad()
def texts_of(pipe: StableDiffusionPipeline, names: list[str]) -> Tensor:
    """The text encoder's answer to each name: (names, tokens, width)."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return pipe.text_encoder(pipe.tokenizer(names, **options).input_ids)[0]


def train(pipe: StableDiffusionPipeline, data: Path, steps: int) -> list[float]:
    """Add a LoRA to the pipeline's denoiser and teach it. Returns the losses."""
    images, names = emoji(data)
    latents = latents_of(pipe, gilded(images))
    texts = texts_of(pipe, names)
    unguided = texts_of(pipe, [""])[0]
    pipe.unet.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS))
    pipe.unet.add_adapter(config, adapter_name="gold")
    weights = [weight for weight in pipe.unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PHASE.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    noising = DDPMScheduler(**NOISE_SCHEDULE)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        indices = random_indices(latents, generator, BATCH)
        text = texts[indices].clone()
        text[torch.rand(BATCH, generator=generator) < 0.1] = unguided

        def predict(noisy: Tensor, timesteps: Tensor, text: Tensor = text) -> Tensor:
            return pipe.unet(noisy, timesteps, encoder_hidden_states=text).sample

        loss = noise_loss(predict, latents[indices], generator, noising, PHASE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}: loss {np.mean(losses[-50:]):.4f}", flush=True)
    return losses


def grid(pipe: StableDiffusionPipeline) -> Image.Image:
    """Two rows of one image a prompt: without the LoRA, with it."""
    rows = []
    for weight in (0.0, 1.0):
        pipe.set_adapters(["gold"], [weight])
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS_SHOWN))]
        options = {"guidance_scale": 4.0, "num_inference_steps": 25, "output_type": "np"}
        images = pipe(list(PROMPTS_SHOWN), generator=generators, **options).images
        rows.append(np.concatenate(list(images), axis=1))
    whole = np.concatenate(rows, axis=0)
    return Image.fromarray((whole * 255).round().astype(np.uint8))


def card(steps: int, losses: list[float], minutes: float) -> str:
    return f"""---
base_model: zoo:emoji
license: apache-2.0
tags: [lora, text-to-image]
---
# A LoRA for zoo:emoji: gold

Trained by `python zoo/train_lora.py` on 1,379 Noto Color Emoji (SIL OFL 1.1) in shades of gold:
rank {RANK}, {steps} steps of {BATCH} images, {minutes:.0f} minutes on one busy core. Mean loss of
the first 50 steps {np.mean(losses[:50]):.4f}, of the last 50 {np.mean(losses[-50:]):.4f}.

![samples](samples.png)

The same seeds without the LoRA (above) and with it: {", ".join(PROMPTS_SHOWN)}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=PHASE.until)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    began = time.monotonic()
    source = zoo.folder("emoji")
    pipe = StableDiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    losses = train(pipe, options.data, options.steps)
    minutes = (time.monotonic() - began) / 60
    options.out.mkdir(parents=True, exist_ok=True)
    learnt = get_peft_model_state_dict(pipe.unet, adapter_name="gold")
    state = {name: tensor.half() for name, tensor in learnt.items()}
    StableDiffusionPipeline.save_lora_weights(options.out, unet_lora_layers=state)
    grid(pipe).save(options.out / "samples.png")
    (options.out / "README.md").write_text(card(options.steps, losses, minutes))
    print(json.dumps({"steps": options.steps, "minutes": minutes, "folder": str(options.out)}))


if __name__ == "__main__":
    main()
