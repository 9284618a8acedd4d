"""Random LoRAs for a UNet, as the files that diffusers loads: one content in every layout."""

from collections.abc import Mapping

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

RANK = 3
ALPHA = 6.0
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj")


def random_lora(
    unet: nn.Module, endings: tuple[str, ...] = ATTENTION + CONVOLUTIONS, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up of each layer of the float UNet whose name ends so."""
    torch.manual_seed(seed)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in unet.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        if not any(name.endswith(f".{ending}") for ending in endings):
            continue
        rows, columns, *kernel = layer.weight.shape
        size = layer.weight[0].numel() ** 0.5
        up = torch.randn(rows, RANK, *[1] * len(kernel)) * 0.2
        factors[name] = (torch.randn(RANK, columns, *kernel) / size, up)
    return factors


def peft_layout(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What diffusers writes: unet.NAME.lora_A.weight. It has no alpha, so the scale is in `up`."""
    state: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        state[f"unet.{name}.lora_A.weight"] = down
        state[f"unet.{name}.lora_B.weight"] = up * (ALPHA / RANK)
    return state


def old_layout(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What diffusers wrote before it used peft: unet.NAME.lora.down.weight."""
    state: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        state[f"unet.{name}.lora.down.weight"] = down
        state[f"unet.{name}.lora.up.weight"] = up * (ALPHA / RANK)
    return state


def kohya_layout(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What kohya's scripts write: lora_unet_NAME with underscores, and an alpha for each layer."""
    state: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        state[f"{flat}.lora_down.weight"] = down
        state[f"{flat}.lora_up.weight"] = up
        state[f"{flat}.alpha"] = torch.tensor(ALPHA)
    return state


def dora_layout(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A DoRA: beside both factors, the length of each row of the new weight."""
    state = peft_layout(factors)
    for name, (_, up) in factors.items():
        state[f"unet.{name}.lora_magnitude_vector"] = torch.ones(len(up))
    return state


LAYOUTS = {"peft": peft_layout, "old": old_layout, "kohya": kohya_layout}


def load(pipe: StableDiffusionPipeline, state: dict[str, Tensor], name: str = "style") -> None:
    pipe.load_lora_weights(
        {key: tensor.clone() for key, tensor in state.items()}, adapter_name=name
    )
