"""Run recipes from end to end on random weights of the real architecture: few images, few steps.

    PYTHONPATH=tests python bench/rehearse_recipes.py --out DIR [--recipes cifar10-ddim] [--tiny]

--tiny takes the same layouts with few channels. Of each file, the first row of each method is run,
or with `--rows all` every row.

A row goes through `lowtide run`, with its own method, bits, profile, sampler and guidance; only
what costs time is cut. Its packed folder is loaded and draws one image. DIR keeps a line for each
finished row, and a second run goes on. Figures of quality mean nothing here: the table says what
the paper says, and ours.
"""

import argparse
import json
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from recipe_pipelines import PIPELINES, pipeline

from lowtide import sampling
from lowtide.report.text import table
from lowtide.workflows import recipe_files

Json = dict[str, Any]
RECIPES = Path(__file__).parents[1] / "recipes"
IMAGES = 2
HEAD = ["recipe", "row", "parameters", "packed, MB", "minutes", "the paper", "ours"]
# What costs time, and does not change which code runs.
SHORT: Json = {"iters": 1, "range_iters": 1, "calibration_steps": 1}


def changes_of(options: Json, steps: int) -> list[str]:
    """The changes that make a row short; options that it does not set stay unset."""
    changes: Json = {"images": IMAGES, "steps": steps}
    changes |= {name: value for name, value in SHORT.items() if name in options}
    if "iters" in options:
        changes["batch"] = IMAGES
    if "labels" in options:
        changes["labels"] = list(options["labels"][:IMAGES])
    return [f"{name}={json.dumps(value)}" for name, value in changes.items()]


def rehearsed(recipe: str, row: str, source: Path, steps: int) -> Json:
    """One row from the float folder to an image."""
    started = time.perf_counter()
    path = RECIPES / f"{recipe}.toml"
    file = recipe_files.read(path)
    chosen = file.row(row)
    options = file.options(chosen)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "packed"
        changes = changes_of(options, steps)
        recipe_files.run_row(path, row, out, changes=changes, model=str(source))
        drawn = drawn_from(out, options, steps)
        packed = sum(each.stat().st_size for each in out.rglob("*.safetensors"))
    if not np.isfinite(drawn).all() or not drawn.std():
        raise ValueError("found an image of one colour, or NaN")
    return {
        "recipe": recipe,
        "row": row,
        "packed": packed,
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "published": " ".join(chosen.published.split()),
        "ours": chosen.ours,
    }


def drawn_from(folder: Path, options: Json, steps: int) -> np.ndarray:
    """One image of a packed folder, with the row's guidance."""
    pipe = sampling.load_pipeline(folder)
    asked = {name: options[name] for name in ("guidance",) if name in options}
    if "labels" in options:
        asked["labels"] = (0,)
    if "prompts" in sampling.supported_fields(pipe):
        asked["prompts"] = ("a b c",)
    return sampling.images(pipe, sampling.Request(steps=steps, seeds=(0,), **asked))


def chosen_rows(recipe: str, which: str) -> list[str]:
    """All rows of a file, or the first of each method."""
    rows = recipe_files.read(RECIPES / f"{recipe}.toml").rows
    if which == "all":
        return list(rows)
    firsts = {row.method: name for name, row in reversed(rows.items())}
    return [name for name in rows if name in firsts.values()]


def finished(out: Path) -> dict[tuple[str, str], Json]:
    path = out / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = [json.loads(line) for line in lines]
    return {(each["recipe"], each["row"]): each for each in done}


def run(options: argparse.Namespace) -> list[Json]:
    """Every row that has no line yet; the rows that failed."""
    failed: list[Json] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for recipe in options.recipes.split(","):
        rows = [
            row
            for row in chosen_rows(recipe, options.rows)
            if (recipe, row) not in finished(options.out)
        ]
        if not rows:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "float"
            pipe = pipeline(recipe, Path(scratch), tiny=options.tiny)
            count = sum(each.numel() for each in sampling.denoiser(pipe).parameters())
            pipe.save_pretrained(source)
            del pipe
            for row in rows:
                try:
                    line = rehearsed(recipe, row, source, options.steps) | {"parameters": count}
                except Exception as error:
                    traceback.print_exc()
                    failed.append({"recipe": recipe, "row": row, "failed": str(error)})
                    continue
                with (options.out / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
    return failed


def line_of(result: Json) -> list[str]:
    return [
        result["recipe"],
        result["row"],
        f"{result['parameters'] / 1e6:.1f} M",
        f"{result['packed'] / 1e6:.1f}",
        f"{result['minutes']:.1f}",
        result["published"],
        result["ours"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", default=",".join(PIPELINES))
    parser.add_argument("--rows", choices=("first", "all"), default="first")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    failed = run(options)
    print("\n".join(table(HEAD, [line_of(each) for each in finished(options.out).values()])))
    for each in failed:
        print(f"failed: {each['recipe']} {each['row']}: {each['failed']}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
