"""A realistic evidence folder without a model: landscapes, and errors as quantization has them.

`python tests/report/evidence.py DIR [SIDE]` writes one and draws it, to look at the page.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lowtide.report.page import draw

SEEDS = 16
TIMESTEPS = list(range(980, -1, -20))
FEW = TIMESTEPS[:: len(TIMESTEPS) // 8][:8]
SETTINGS = {
    "float": {"name": "float", "kind": "float", "bytes": 4_449_636, "seconds_per_step": 0.0213},
    "minmax": {
        "name": "minmax W4A8",
        "kind": "lowtide",
        "method": "minmax",
        "bytes": 643_100,
        "seconds_per_step": 0.0388,
    },
    "tfmq": {
        "name": "tfmq W4A8",
        "kind": "lowtide",
        "method": "tfmq",
        "bytes": 661_340,
        "seconds_per_step": 0.0391,
    },
    "quanto": {
        "name": "quanto W8A8",
        "kind": "peer",
        "bytes": 1_178_004,
        "seconds_per_step": 0.0226,
    },
}
DAMAGE = {"float": 0.0, "minmax": 0.1, "tfmq": 0.045, "quanto": 0.02}
TIMES = {"minmax": (6.1, 0.0, 0.4), "tfmq": (7.7, 44.2, 9.8)}
FEATURES = [
    f"{place}.time_emb_proj"
    for place in (
        "down_blocks.0.resnets.0",
        "down_blocks.1.resnets.0",
        "down_blocks.2.resnets.0",
        "mid_block.resnets.0",
        "mid_block.resnets.1",
        *(f"up_blocks.{block}.resnets.{net}" for block in range(3) for net in range(2)),
    )
]


def landscape(seed: int, side: int) -> np.ndarray:
    """A sky, a sun and hills, in colours of the seed's own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    top, low, sun, hill = rng.random((4, 3)) * 0.7 + 0.2
    image = top + (low - top) * y[..., None]
    cx = rng.uniform(0.2, 0.8)
    cy = rng.uniform(0.15, 0.5)
    radius = rng.uniform(0.08, 0.2)
    image[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = np.sqrt(sun)
    for layer in range(3):
        waves = rng.uniform(0.02, 0.08) * np.sin(
            2 * np.pi * (rng.uniform(0.7, 2.2) * x + rng.random())
        )
        image[y > 0.5 + 0.14 * layer + waves] = hill * (1 - 0.28 * layer)
    return image


def damaged(image: np.ndarray, amount: float, seed: int) -> np.ndarray:
    """Blotches of another colour, as a wrong step of the trajectory leaves them, and grain."""
    rng = np.random.default_rng(1000 + seed)
    side = len(image)
    coarse = np.kron(rng.standard_normal((4, 4, 3)), np.ones((side // 4, side // 4, 1)))
    return image + amount * (0.8 * coarse + 0.6 * rng.standard_normal(image.shape))


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8)).save(path)


def write_images(folder: Path, side: int) -> dict[str, list[float]]:
    """The images, and each model's PSNR per image."""
    psnr: dict[str, list[float]] = {key: [] for key in SETTINGS}
    for seed in range(SEEDS):
        original = landscape(seed, side)
        for key, amount in DAMAGE.items():
            image = damaged(original, amount, seed)
            write(folder / "images" / key / f"{seed}.png", image)
            error = float(np.mean((np.clip(image, 0, 1) - np.clip(original, 0, 1)) ** 2))
            psnr[key].append(-10 * np.log10(error) if error else float("inf"))
    return psnr


def layers() -> list[dict[str, Any]]:
    """Names, units and parameters like those of a small UNet, in forward order."""
    entries = [
        layer("temporal:time_embedding.linear_1", f"time_embedding.linear_{number}", 64 * 256)
        for number in (1, 2)
    ]
    entries.append(layer("conv_in", "conv_in", 3 * 64 * 9))
    places = [
        ("down_blocks", 0, 64),
        ("down_blocks", 1, 128),
        ("down_blocks", 2, 128),
        ("mid_block", None, 128),
    ]
    places += [("up_blocks", 0, 128), ("up_blocks", 1, 128), ("up_blocks", 2, 64)]
    for block, number, width in places:
        stem = block if number is None else f"{block}.{number}"
        for net in range(1 if block == "down_blocks" else 2):
            unit = f"{stem}.resnets.{net}"
            entries += [layer(unit, f"{unit}.conv{part}", width * width * 9) for part in (1, 2)]
        if width == 128 and number != 1:
            unit = f"{stem}.attentions.0"
            entries += [
                layer(unit, f"{unit}.{part}", width * width)
                for part in ("to_q", "to_k", "to_v", "to_out.0")
            ]
    return [*entries, layer("conv_out", "conv_out", 64 * 3 * 9)]


def layer(unit: str, name: str, parameters: int) -> dict[str, Any]:
    ends = name in ("conv_in", "conv_out")
    return {
        "name": name,
        "unit": unit,
        "weights": 8 if ends else 4,
        "inputs": 8,
        "parameters": parameters,
        "kernel": "reference",
    }


def measured(values: list[float], better: bool, backend: str) -> dict[str, Any]:
    spread = 1.96 * float(np.std(values)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return {
        "value": mean,
        "low": mean - spread,
        "high": mean + spread,
        "n": len(values),
        "higher_is_better": better,
        "backend": backend,
        "weights": None,
        "resize": "none",
        "seeds": f"0-{len(values) - 1}",
    }


def metrics(psnr: list[float], amount: float) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    wobble = rng.uniform(0.7, 1.3, len(psnr))
    lpips = measured((1.9 * amount * wobble).tolist(), False, "lowtide") | {
        "weights": "sha256:3f1c9a07"
    }
    fd = measured((412 * amount * wobble).tolist(), False, "lowtide") | {
        "weights": "efficientnet-lite0",
        "resize": "bicubic, antialias, 112",
    }
    return {
        "psnr": measured(psnr, True, "lowtide"),
        "ssim": measured((1 - 2.2 * amount * wobble).tolist(), True, "lowtide"),
        "lpips": lpips,
        "latent_mse": measured((amount**2 * wobble).tolist(), False, "lowtide"),
        "fd-efficientnet": fd,
    }


def model(key: str, psnr: list[float]) -> dict[str, Any]:
    amount = DAMAGE[key]
    base = SETTINGS[key] | {"source": "zoo:digits" if key == "float" else key, "metrics": {}}
    if key == "float":
        return base
    base |= {
        "metrics": metrics(psnr, amount),
        "per_image": {"psnr": psnr},
        "weights": 8 if key == "quanto" else 4,
        "inputs": 8,
    }
    steps = np.arange(1, len(TIMESTEPS) + 1)
    path = amount * 2.4 * (1 - np.exp(-steps / 14)) * (1 + 0.04 * np.sin(steps / 2))
    base["trajectory"] = {"timesteps": TIMESTEPS, "error": path.tolist()}
    return base if key == "quanto" else base | made(key, amount)


def made(key: str, amount: float) -> dict[str, Any]:
    """What lowtide alone can tell of its own checkpoints."""
    collect, reconstruct, pack = TIMES[key]
    total = sum(TIMES[key])
    return {
        "profile": "full",
        "layers": layer_errors(amount),
        "temporal": temporal_errors(amount),
        "bits": layers(),
        "left": {
            "mid_block.attentions.0": "attention scores: no gain was measured",
            "conv_norm_out": "normalization has no matrix to pack",
        },
        "stages": {
            "Collect": collect,
            "Reconstruct": reconstruct,
            "FitRanges": total * 0.06,
            "Pack": pack,
        },
        "predicted": {"bytes": 655_000, "peak_bytes": 151e6, "minutes": total / 60 * 0.8},
        "real": {"bytes": SETTINGS[key]["bytes"], "peak_bytes": 212.7e6, "minutes": total / 60},
        "float_share": 0.021,
        "peak_bytes": 212_700_000,
    }


def layer_errors(amount: float) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    depth = np.linspace(0.15, 1, len(layers()))[:, None] ** 1.5
    late = np.linspace(0.3, 1.6, len(FEW))[None, :] ** 2
    error = amount * depth * late * rng.lognormal(0, 0.45, (len(layers()), 1))
    names = [each["name"] for each in layers()]
    units = [each["unit"] for each in layers()]
    return {"names": names, "units": units, "timesteps": FEW, "error": error.tolist()}


def temporal_errors(amount: float) -> dict[str, Any]:
    rng = np.random.default_rng(6)
    waves = 1.4 + np.sin(np.arange(len(TIMESTEPS)) / 6)[None, :]
    error = (
        (6 * amount) ** 4
        * waves
        * rng.lognormal(0, 0.7, (len(FEATURES), 1))
        * rng.lognormal(0, 0.2, (len(FEATURES), len(TIMESTEPS)))
    )
    return {"features": FEATURES, "timesteps": TIMESTEPS, "error": error.tolist()}


def record(psnr: dict[str, list[float]]) -> dict[str, Any]:
    words = [
        "red sun over two hills",
        "a green valley",
        "evening",
        "snow",
        "a lake at noon",
        "desert",
        "fog in the morning",
        "island",
    ]
    return {
        "version": 1,
        "title": "Landscapes at four bits",
        "command": "lowtide compare zoo:landscapes runs/minmax-w4a8 runs/tfmq-w4a8 "
        "peers/quanto-w8a8 --seeds 0-15 --min-psnr 22",
        "date": "2026-11-21T08:14:00+00:00",
        "environment": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "diffusers": "0.42.1",
            "lowtide": "0.1.0",
            "cpu": "x86-64, AVX-512",
            "threads": 1,
            "gpu": None,
        },
        "request": {
            "steps": 50,
            "seeds": list(range(SEEDS)),
            "prompts": words,
            "labels": [],
            "batch": 8,
            "guidance": 4.0,
            "eta": None,
            "scheduler": "DDIMScheduler",
        },
        "captions": [words[seed % len(words)] for seed in range(SEEDS)],
        "reference": "float",
        "models": {key: model(key, psnr[key]) for key in SETTINGS},
        "gates": [
            {
                "name": "min-psnr",
                "model": key,
                "limit": 22.0,
                "value": float(np.mean(psnr[key])),
                "passed": bool(np.mean(psnr[key]) >= 22),
            }
            for key in SETTINGS
            if key != "float"
        ],
    }


def make(folder: Path, side: int = 32) -> Path:
    """Write the folder; `side` is the images' width and height."""
    psnr = write_images(folder, side)
    return rewrite(folder, record(psnr))


def rewrite(folder: Path, data: dict[str, Any]) -> Path:
    (folder / "evidence.json").write_text(json.dumps(data))
    return folder


if __name__ == "__main__":
    print(draw(make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 32)))
