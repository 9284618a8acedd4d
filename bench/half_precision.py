"""What half precision costs a packed model: `python bench/half_precision.py`.

The float model in float32 is the reference of every row. A row is the float model in another type,
or a method at a width, loaded and learnt in that type. Finished rows are kept in --out. diffusers
makes no images of an unconditional model in bfloat16, so zoo:digits is in float16 alone. A CPU
learns in float16 many times slower than in float32: `--types float16 --methods minmax` is quick.
"""

import argparse
from pathlib import Path

from lowtide import sampling
from lowtide.evaluation.path_errors import draw, image_error, step_error
from lowtide.report.text import table
from lowtide.sampling.loading import DTYPES
from lowtide.settings import Options
from lowtide.workflows import method_table

REFERENCE = "float32"
TYPES = {
    "zoo:digits": ("float32", "float16"),
    "zoo:digits-cond": ("float32", "bfloat16", "float16"),
}
CONDITIONS: dict[str, Options] = {
    "zoo:digits": {},
    "zoo:digits-cond": {"labels": tuple(range(10)), "guidance": 2.0},
}
HEAD = ["model", "type", "what", "step error", "end error", "PSNR, dB"]
SETTINGS: Options = {
    "steps": 20,
    "images": 16,
    "calibration_steps": 10,
    "iters": 100,
    "batch": 16,
}


def float_rows(model: str, types: tuple[str, ...], images: int) -> list[list[str]]:
    """The float model itself in each half type."""
    request = sampling.Request(
        steps=SETTINGS["steps"], seeds=tuple(range(images)), batch=images, **CONDITIONS[model]
    )
    original = draw(sampling.load_pipeline(model), request)
    rows = []
    for name in types:
        if name == REFERENCE:
            continue
        pipe = sampling.load_pipeline(model, dtype=DTYPES[name])
        ours = draw(pipe, request).images
        step = step_error(sampling.denoiser(pipe), original.calls)
        end = image_error(ours, original.images)
        quality = method_table.psnr(ours, original.images)
        rows.append([model, name, "float", f"{step:.4f}", f"{end:.4f}", f"{quality:.2f}"])
    return rows


def packed_rows(options: argparse.Namespace, model: str, name: str) -> list[list[str]]:
    cells = method_table.grid(options.methods, options.widths, (0,))
    settings = SETTINGS | CONDITIONS[model] | {"dtype": name}
    lines = method_table.quality(model, options.out, cells, settings, options.samples)
    return [
        [
            model,
            name,
            f"{line['method']} {line['width']}",
            f"{line['step_error']:.4f}",
            f"{line['end_error']:.4f}",
            f"{line['psnr']:.2f}",
        ]
        for line in lines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(TYPES))
    parser.add_argument("--methods", default="minmax,tfmq")
    parser.add_argument("--widths", default="W8A8,W4A8")
    parser.add_argument("--types", help="some of the types, with commas between")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/half"))
    options = parser.parse_args()
    rows: list[list[str]] = []
    for model in options.models.split(","):
        asked = options.types.split(",") if options.types else TYPES[model]
        types = tuple(name for name in TYPES[model] if name in asked)
        rows += float_rows(model, types, options.samples)
        for name in types:
            rows += packed_rows(options, model, name)
    print("\n".join(table(HEAD, rows)))


if __name__ == "__main__":
    main()
