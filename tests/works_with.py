"""Write docs/works-with.md from tiny random instances: `python tests/works_with.py [ROW ...]`.

Each pipeline is quantized with three methods, saved, loaded and called again: "yes" means that the
denoiser's answers are those of the model that was saved, bit for bit. Where lowtide refuses, the
cell holds its sentence.
"""

import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pipeline_rows import ROWS, Row

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.sampling.recording import draw

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "works-with.md"
FLOAT = "without data"
METHODS = ("minmax", "tfmq", "best", FLOAT)
OPTIONS = {"steps": 3, "images": 2, "inputs": 8}
LEARNING = {"iters": 2, "calibration_steps": 2}
BEGIN = "<!-- table: python tests/works_with.py -->"
END = "<!-- end of table -->"
YES = "yes"


def request(row: Row) -> sampling.Request:
    return sampling.Request(steps=3, seeds=(5, 6), call=row.call, **row.fields)


def answers(pipe: Any, row: Row) -> list[torch.Tensor]:
    """What the denoiser answers at each call, or what the pipeline draws without its decoder."""
    if row.drawn:
        return [torch.from_numpy(draw(pipe, request(row), "latent"))]
    return [moment.eps for moment in sampling.trajectory(pipe, request(row))]


def packed(row: Row, method: str, folder: Path) -> Any:
    """The tiny pipeline of this row, packed."""
    pipe = row.build(folder)
    if method == FLOAT:
        return without_data(pipe, folder)
    learning = {} if method == "minmax" else LEARNING
    given = OPTIONS | learning | row.fields
    return lowtide.quantize(pipe, method=method, call=row.call, **given).pipe


def without_data(pipe: Any, folder: Path) -> Any:
    """The pipeline whose denoiser is packed while diffusers loads it."""
    name = sampling.denoiser_name(pipe)
    float_model = getattr(pipe, name)
    float_model.save_pretrained(folder / "float")
    config = lowtide.LowtideConfig(weights=8, inputs=8)
    model = type(float_model).from_pretrained(folder / "float", quantization_config=config)
    pipe.register_modules(**{name: model})
    return pipe


def cell(name: str, method: str) -> str:
    """Whether this pipeline works with this method: yes, or one sentence."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipe = packed(row, method, Path(place))
        except BadInput as error:
            return sentence(error)
        saved = lowtide.save(pipe, Path(place) / "packed")
        expected = answers(pipe, row)
        again = with_loaded_denoiser(pipe, saved) if row.alone else lowtide.load(saved)
        pairs = zip(expected, answers(again, row), strict=True)
        equal = all(torch.equal(ours, theirs) for ours, theirs in pairs)
    return YES if equal else "no: the loaded model answers differently"


def with_loaded_denoiser(pipe: Any, saved: Path) -> Any:
    """The pipeline with the denoiser of a folder."""
    name = sampling.denoiser_name(pipe)
    pipe.register_modules(**{name: type(getattr(pipe, name)).from_pretrained(saved / name)})
    return pipe


def sentence(error: BadInput) -> str:
    """What was found and the way out, in a cell."""
    found = re.sub(
        r"that fails on inputs .* of shapes alone .*", "whose forward needs values", error.found
    )
    return f"{found.removeprefix('found ')}: {error.way_out}".replace("|", "\\|")


def line(name: str) -> str:
    """A row of the table."""
    row = ROWS[name]
    call = ", ".join(f"`{each}`" for each in row.call)
    cells = [cell(name, method) for method in METHODS]
    notes = list(dict.fromkeys(f"{each}." for each in cells if each != YES))
    shown = [each if each == YES else "no" for each in cells]
    return f"| {' | '.join([row.title, call, *shown, *(notes or [''])])} |"


def lines_of(page: str) -> list[str]:
    """The rows of the generated table in a page."""
    table = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    return table[2:]


def head() -> list[str]:
    titles = ["pipeline", "`call` in the test", *METHODS, "note"]
    return [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]


def written(rows: Iterable[str]) -> str:
    """The page with this table in the place of the old one."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join([*head(), *rows])
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(names: list[str]) -> None:
    """Make these rows again, or all."""
    known = dict(zip(ROWS, lines_of(PAGE.read_text()), strict=False))
    for name in names or ROWS:
        known[name] = line(name)
        print(known[name], flush=True)
    PAGE.write_text(written(known[name] for name in ROWS if name in known))


if __name__ == "__main__":
    main(sys.argv[1:])
