"""report.html: says what the evidence says, leaves out what it lacks, needs nothing but itself, and stays small."""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report.evidence import SEEDS, SETTINGS, TIMESTEPS, make, record, rewrite, write_images

from lowtide.errors import BadInput
from lowtide.report.page import MOST_BYTES, SECTIONS, draw, evidence, heat, markup, numbers, plot

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def psnr(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return write_images(tmp_path_factory.mktemp("images"), 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


def changed(folder: Path, change: Change) -> Path:
    data = json.loads((folder / "evidence.json").read_text())
    change(data)
    return rewrite(folder, data)


def drawn(folder: Path, change: Change = lambda data: None) -> str:
    return draw(changed(folder, change)).read_text()


def anchors(page: str) -> set[str]:
    return set(re.findall(r'<section id="([a-z]+)"', page))


def cells(page: str, metric: str) -> list[str]:
    """The cells of a row of the table of metrics, for each model."""
    row = next(row for row in re.findall(r"<tr>.*?</tr>", page, re.S) if f">{metric} <" in row)
    return re.findall(r"<td>.*?</td>", row)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123, "0.0123"),
        (26.158, "26.2"),
        (1234.6, "1,235"),
        (4e-7, "4.00·10⁻⁷"),
        (0, "0"),
        (float("inf"), "∞"),
        (float("nan"), "–"),
    ],
)
def test_figures(value: float, text: str) -> None:
    assert markup.figures(value) == text


def test_numbers_in_words() -> None:
    sizes = [markup.size(count) for count in (4_449_636, 661_340, 2.567e9, 212.7e6, 8_000)]
    assert sizes == ["4.45 MB", "0.661 MB", "2.57 GB", "213 MB", "8.00 kB"]
    lasting = [markup.lasting(value) for value in (6.1, 49.44, 59.97, 61.7, 3600, 7325)]
    assert lasting == ["6.1 s", "49.4 s", "1 min", "1 min 2 s", "1 h 0 min", "2 h 2 min"]
    rounds = {"5.00 MB": "5 MB", "2.50 GB": "2.5 GB", "100 MB": "100 MB", "35.00": "35", "0.02": "0.02"}
    assert [markup.brief(text) for text in rounds] == list(rounds.values())


def test_scales_place_and_tick() -> None:
    backwards = plot.Scale(980, 0)
    assert backwards.place(980) == 0 and backwards.place(245) == 0.75
    assert backwards.ticks() == [0, 200, 400, 600, 800]
    decades = plot.Scale(1e-3, 10, log=True)
    assert decades.place(0.1) == pytest.approx(0.5) and decades.place(0) == 0
    assert decades.ticks() == pytest.approx([1e-3, 1e-2, 0.1, 1, 10])
    assert plot.Scale(6.1, 6.9, log=True).ticks() == pytest.approx([6.2, 6.4, 6.6, 6.8])
    assert plot.scale([5.0, 5.0]).place(5.0) == pytest.approx(0.5)


def test_names_at_line_ends_keep_apart() -> None:
    moved = plot.spread([0.5, 0.51, 0.98, 0.99, 0.1], 0.05)
    order = np.argsort([0.5, 0.51, 0.98, 0.99, 0.1])
    assert np.diff(np.array(moved)[order]).min() >= 0.05 - 1e-9
    assert max(moved) <= 1 and moved[4] == 0.1


def test_the_headline_says_what_was_measured(folder: Path, psnr: dict[str, list[float]]) -> None:
    page = drawn(folder)
    smaller = SETTINGS["float"]["bytes"] / SETTINGS["tfmq"]["bytes"]
    assert f"tfmq W4A8 is {smaller:.1f} times smaller than float and 1.8 times slower a step" in page
    assert f"keep {np.mean(psnr['tfmq']):.2f} dB PSNR" in page
    assert "PSNR 20.09, at least 22: failed" in page and "PSNR 26.96, at least 22<" in page


def test_best_of_each_metric_is_bold(folder: Path) -> None:
    """Up for PSNR, down for LPIPS; the original does not compete."""
    page = drawn(folder)
    for metric in ("PSNR, dB", "LPIPS"):
        assert ["<strong>" in cell for cell in cells(page, metric)] == [False, False, False, True]
    page = drawn(folder, lambda data: data["models"]["tfmq"]["metrics"]["lpips"].update(value=0.001))
    assert ["<strong>" in cell for cell in cells(page, "LPIPS")] == [False, False, True, False]


def test_heat_map_puts_the_worst_cell_where_it_is() -> None:
    error = np.full((5, 3), 0.01)
    error[3, 1], error[0, 2] = 0.5, np.nan
    table = evidence.Drift(tuple("abcde"), tuple("abcde"), (900, 500, 100), error)
    scale = heat.shared([table])
    light = np.asarray(heat.picture(table, scale, "light").convert("L")).astype(int)
    dark = np.asarray(heat.picture(table, scale, "dark").convert("L")).astype(int)
    assert light.shape == (3, 5)
    assert np.unravel_index(light.argmin(), light.shape) == np.unravel_index(dark.argmax(), dark.shape) == (1, 3)
    assert (light[2, 0], dark[2, 0]) == (255, heat_luma(heat.ABSENT["dark"]))


def heat_luma(colour: str) -> int:
    return int(np.asarray(Image.new("RGB", (1, 1), colour).convert("L"))[0, 0])


@pytest.mark.parametrize("ramp", [heat.LIGHT, heat.DARK])
def test_ramps_read_without_colour(ramp: tuple[str, ...]) -> None:
    luma = heat.colours(ramp) @ np.array([0.2126, 0.7152, 0.0722])
    steps = np.diff(luma) * (1 if luma[-1] > luma[0] else -1)
    assert steps.min() > -1 and abs(luma[-1] - luma[0]) > 150


@pytest.mark.parametrize(
    ("unit", "name"),
    [
        ("temporal:time_embedding.linear_1", "time"),
        ("down_blocks.1.resnets.0", "down 1"),
        ("mid_block.attentions.0", "mid"),
        ("conv_in", "in"),
        ("transformer_blocks.12", "transformer 12"),
        ("proj_out", "proj out"),
    ],
)
def test_units_have_short_names(unit: str, name: str) -> None:
    assert heat.place_name(unit) == name


def test_labels_of_points_do_not_collide() -> None:
    here = numbers.Box(0, 0, 50, 18)
    assert here.hits(numbers.Box(49, 17, 5, 5)) and not here.hits(numbers.Box(50, 0, 5, 5))
    assert numbers.Box(-43, 0, 10, 10).outside(100) == 3 and numbers.Box(95, 0, 10, 10).outside(100) == 5
    names, places = ["one", "two", "the rightmost"], [(0.5, 0.5), (0.52, 0.5), (0.98, 0.2)]
    assert numbers.sides_of(names, places, 400, 240) == ["above left", "above right", "above left"]


def test_every_image_is_there_once_and_as_it_was(folder: Path) -> None:
    page = drawn(folder)
    assert page.count("data:image/png") == SEEDS * len(SETTINGS) + 2 * 2 * 2
    assert (folder / "images" / "tfmq" / "3.png").read_bytes() in decoded(page)


def decoded(page: str) -> set[bytes]:
    return {base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)}


def test_nothing_is_fetched(folder: Path) -> None:
    page = drawn(folder)
    assert not re.search(r"https?://|url\((?!data:)|@import|<link[^>]+href=\"(?!data:)", page)
    assert {found[:5] for found in re.findall(r'src="([^"]+)"', page)} == {"data:"}
    assert "default-src 'none'" in page


OPTIONAL = {
    "trajectory": ["trajectory"],
    "layers": ["layers"],
    "temporal": ["temporal"],
    "bits": ["bits"],
    "time": ["stages"],
    "predicted": ["predicted", "real"],
    "float": ["left"],
    "metrics": ["metrics"],
}


@pytest.mark.parametrize("absent", [None, "gone"])
@pytest.mark.parametrize("anchor", OPTIONAL)
def test_what_was_not_measured_leaves_its_section_out(folder: Path, anchor: str, absent: str | None) -> None:
    def without(data: dict[str, Any]) -> None:
        for model in data["models"].values():
            for key in OPTIONAL[anchor]:
                model.pop(key, None) if absent else model.update({key: None})

    whole = anchors(drawn(folder))
    page = drawn(folder, without)
    lost = {anchor, "pareto"} if anchor == "metrics" else {anchor}
    assert whole - anchors(page) == lost
    assert next(section.absent for section in SECTIONS if section.anchor == anchor) in page


def test_one_float_model_alone_is_a_page(folder: Path) -> None:
    def alone(data: dict[str, Any]) -> None:
        data["models"] = {"float": data["models"]["float"]}
        data["gates"] = data["captions"] = None

    assert anchors(drawn(folder, alone)) == {"images", "command"}


def test_without_images_the_rest_is_drawn(tmp_path: Path, psnr: dict[str, list[float]]) -> None:
    page = draw(rewrite(tmp_path, record(psnr))).read_text()
    assert "images" not in anchors(page) and "images were not found" in page


def test_infinite_and_missing_numbers_are_drawn(folder: Path) -> None:
    def odd(data: dict[str, Any]) -> None:
        model = data["models"]["tfmq"]
        model["metrics"]["psnr"].update(value=float("inf"), low=None, high=None)
        model["per_image"]["psnr"][0] = None
        model["layers"]["error"][0][0] = float("nan")
        model["trajectory"]["error"][3] = float("nan")

    page = drawn(folder, odd)
    assert "∞ dB" in page
    for found in re.findall(r'<script type="application/json">(.*?)</script>', page):
        assert json.loads(found, parse_constant=pytest.fail)


def test_names_are_text_and_never_markup(folder: Path) -> None:
    def hostile(data: dict[str, Any]) -> None:
        data["title"] = data["models"]["tfmq"]["name"] = data["captions"][0] = '</script><img src=x onerror="alert(1)">'

    page = drawn(folder, hostile)
    assert "<img src=x" not in page and page.count("</script>") == drawn(folder).count("</script>")


def test_a_page_of_heavy_images_stays_under_its_bound(tmp_path: Path) -> None:
    """Noise at 512 pixels, 19 MB of it: images shrink, and the page says so."""
    rng = np.random.default_rng(0)
    make(tmp_path)
    for path in (tmp_path / "images").rglob("*.png"):
        path.unlink()
    data = json.loads((tmp_path / "evidence.json").read_text())
    data["request"]["seeds"], data["captions"] = list(range(6)), []
    for key, model in data["models"].items():
        model.pop("per_image", None)
        for seed in range(6):
            Image.fromarray(rng.integers(0, 256, (512, 512, 3), np.uint8)).save(tmp_path / "images" / key / f"{seed}.png")
    page = draw(rewrite(tmp_path, data))
    assert 1_000_000 < page.stat().st_size < MOST_BYTES
    assert "384×384 pixels" in page.read_text()


BAD: dict[str, tuple[Change, str]] = {
    "version": (lambda data: data.update(version=2), "found evidence of version 2; expected version 1"),
    "reference": (lambda data: data.update(reference="none"), "found reference 'none'; expected one of the models float, minmax"),
    "no title": (lambda data: data.pop("title"), "found no 'title' in evidence.json"),
    "models": (lambda data: data.update(models=[]), "found [] as 'models' in evidence.json; expected an object"),
    "bytes": (lambda data: data["models"]["tfmq"].update(bytes="1 MB"), "found '1 MB' as 'bytes' in tfmq of models"),
    "no bytes": (
        lambda data: data["models"]["tfmq"].pop("bytes"),
        "found no 'bytes' in tfmq of models of evidence.json; expected",
    ),
    "zero bytes": (lambda data: data["models"]["tfmq"].update(bytes=0), "found 0 as 'bytes' in tfmq of models"),
    "captions": (lambda data: data["captions"].pop(), "found 15 captions; expected one for each of the 16 seeds"),
    "gate": (lambda data: data["gates"][0].update(model="x"), "found model 'x' in gates[0]"),
    "ragged": (lambda data: data["models"]["tfmq"]["layers"]["error"][2].pop(), "ragged or missing errors in layers of tfmq"),
    "short": (
        lambda data: data["models"]["tfmq"]["trajectory"]["error"].pop(),
        f"found 1 x {len(TIMESTEPS) - 1} errors",
    ),
    "per image": (lambda data: data["models"]["tfmq"]["per_image"]["psnr"].pop(), "found 15 values of psnr"),
    "seeds": (lambda data: (data["request"]["seeds"].append(99), data.update(captions=None)), "found no image"),
    "no seeds": (lambda data: data["request"].update(seeds=[]), "found no seeds"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_evidence_is_one_sentence(folder: Path, name: str) -> None:
    change, expected = BAD[name]
    with pytest.raises(BadInput) as caught:
        draw(changed(folder, change))
    assert expected in str(caught.value)
    assert not (folder / "report.html").exists()


def test_wrong_folders_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="found an empty folder"):
        draw(tmp_path)
    with pytest.raises(BadInput, match="found no folder"):
        draw(tmp_path / "nowhere")
    (tmp_path / "evidence.json").write_text("{")
    with pytest.raises(BadInput, match="does not parse"):
        draw(tmp_path)
    rewrite(tmp_path, [])
    with pytest.raises(BadInput, match="found list as evidence"):
        draw(tmp_path)


def test_wrong_images_are_one_sentence(folder: Path) -> None:
    Image.new("RGB", (16, 16)).save(folder / "images" / "tfmq" / "2.png")
    with pytest.raises(BadInput, match="found images of sizes 32x32 and 16x16"):
        draw(folder)
    (folder / "images" / "tfmq" / "2.png").write_text("no image")
    with pytest.raises(BadInput, match="that cannot be read"):
        draw(folder)


def test_drawing_imports_no_torch() -> None:
    program = "import sys, lowtide.report.page; print({'torch', 'diffusers', 'matplotlib'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "set()\n"
