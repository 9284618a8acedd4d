"""How far images of the same seeds are apart between runtimes, for every model of the zoo.

    python bench/same_images.py [--models zoo:digits,zoo:emoji] [--widths w8a8,w4a8]

fused beside plain: the native program and the packed layers one by one. plain beside itself: the
same layers on inputs of the denoiser that are greater by one part in ten million, the last digit of
float32. A rounding turns a difference of a last digit into one of a whole code where a value lies
at a tie, and the sampler carries it on. So two runtimes cannot be closer than a runtime and itself.
PSNR in dB over the images of four seeds, the mean and the least.
"""

import argparse
import sys
from typing import Any

import numpy as np
import torch
from torch import nn

import lowtide
from lowtide import sampling
from lowtide.evaluation.metrics.pairs import each_psnr
from lowtide.workflows.method_ranks import lined

STEPS = 20
SEEDS = (11, 12, 13, 14)
LAST_DIGIT = 1e-7
CALLS: dict[str, dict[str, Any]] = {
    "zoo:digits": {},
    "zoo:digits-cond": {"labels": (3, 7)},
    "zoo:cifar10-small": {},
    "zoo:emoji": {"prompts": ("rocket", "pizza")},
    "zoo:dit": {"labels": (3, 7)},
}


def changed(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The inputs of a call of the denoiser, the first of them in its last digit."""
    if args:
        return (args[0] * (1 + LAST_DIGIT), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, kwargs | {first: kwargs[first] * (1 + LAST_DIGIT)}


def distances(name: str, weights: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Two PSNRs of each image: fused against plain, and plain against plain on changed inputs."""
    widths = {"weights": weights, "inputs": inputs}
    packed = lowtide.quantize(name, method="minmax", steps=STEPS, images=4, **widths, **CALLS[name])
    request = sampling.Request(steps=STEPS, seeds=SEEDS, batch=2, **CALLS[name])
    fused = sampling.images(packed.pipe, request)
    with lowtide.unfused(packed.model):
        plain = sampling.images(packed.pipe, request)
        hook = packed.model.register_forward_pre_hook(changed, with_kwargs=True)
        again = sampling.images(packed.pipe, request)
        hook.remove()
    return each_psnr(fused, plain), each_psnr(again, plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(CALLS))
    parser.add_argument("--widths", default="w8a8,w4a8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [["model", "widths", "fused beside plain", "plain beside itself"], ["---"] * 4]
    for name in options.models.split(","):
        for width in options.widths.split(","):
            weights, inputs = (int(bits) for bits in width[1:].split("a"))
            pairs = distances(name, weights, inputs)
            cells = [f"{np.mean(each):.1f}, {np.min(each):.1f}" for each in pairs]
            rows.append([name, width.upper(), *cells])
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(lined(rows)))


if __name__ == "__main__":
    main()
