"""report.html says what the evidence says, leaves out what it lacks, and stands alone."""

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
from markupsafe import Markup
from PIL import Image
from report.evidence import SEEDS, SETTINGS, TIMESTEPS, make, record, rewrite, write_images

from lowtide.errors import BadInput
from lowtide.report.page import MOST_BYTES, draw, plots

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def psnr(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return write_images(tmp_path_factory.mktemp("images"), 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the evidence as it is; drawn once, because plots take time."""
    return draw(make(tmp_path_factory.mktemp("page"))).read_text()


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections with an empty plot each, for tests of what stands around the plots."""
    monkeypatch.setattr(plots, "plot", lambda label, draw: Markup("<svg></svg>"))


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
    table = page.partition('<section id="metrics"')[2]
    row = next(row for row in re.findall(r"<tr>.*?</tr>", table, re.S) if f">{metric}<" in row)
    return re.findall(r"<td>.*?</td>", row, re.S)


def test_the_headline_says_what_was_measured(page: str, psnr: dict[str, list[float]]) -> None:
    smaller = SETTINGS["float"]["bytes"] / SETTINGS["tfmq"]["bytes"]
    assert (
        f"tfmq W4A8 is {smaller:.1f} times smaller than float and 1.8 times slower a step" in page
    )
    assert f"keep {np.mean(psnr['tfmq']):.2f} dB PSNR" in page
    assert "PSNR 20.09, at least 22: failed" in page and "PSNR 26.96, at least 22<" in page


def test_best_of_each_metric_is_bold(folder: Path, page: str) -> None:
    """Up for PSNR, down for LPIPS; the original does not compete."""
    for metric in ("PSNR, dB", "LPIPS"):
        assert ["<strong>" in cell for cell in cells(page, metric)] == [False, False, False, True]
    page = drawn(
        folder, lambda data: data["models"]["tfmq"]["metrics"]["lpips"].update(value=0.001)
    )
    assert ["<strong>" in cell for cell in cells(page, "LPIPS")] == [False, False, True, False]


def test_plots_follow_the_theme(page: str) -> None:
    """No fixed colour remains in a plot, and no id occurs twice on the page."""
    svgs = re.findall(r'<svg class="(?:wide|narrow)".*?</svg>', page, re.S)
    assert len(svgs) == 2 * (1 + 1 + 2)
    assert not [svg for svg in svgs if re.search(r"(fill|stroke): #(?!00000)", svg)]
    assert all('role="img" aria-label="' in svg for svg in svgs)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_every_image_is_there_once_and_as_it_was(folder: Path, page: str) -> None:
    assert page.count("data:image/png") == SEEDS * len(SETTINGS) + 2 * 2 * 3
    assert (folder / "images" / "tfmq" / "3.png").read_bytes() in decoded(page)


def decoded(page: str) -> set[bytes]:
    return {
        base64.b64decode(text)
        for text in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    }


def test_nothing_is_fetched(page: str) -> None:
    assert not re.search(r"https?://|url\((?!data:|#)|@import|<link[^>]+href=\"(?!data:)", page)
    assert {text[:5] for text in re.findall(r'(?:src|xlink:href)="([^"#]+)"', page)} == {"data:"}
    assert "default-src 'none'" in page


OPTIONAL = {
    "trajectory": (["trajectory"], "The trajectory was not recorded."),
    "layers": (["layers"], "Errors by layer were not recorded."),
    "temporal": (["temporal"], "Temporal features that depend on the timestep alone do not exist"),
    "bits": (["bits"], "Bits by layer are unknown."),
    "time": (["stages"], "Quantization was not timed."),
    "predicted": (["predicted", "real"], "Nothing was predicted."),
    "float": (["left"], "Nothing was left in float, or it was not recorded."),
    "metrics": (["metrics"], "Metrics were not measured."),
}


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("absent", [None, "gone"])
@pytest.mark.parametrize("anchor", OPTIONAL)
def test_what_was_not_measured_leaves_its_section_out(
    folder: Path, page: str, anchor: str, absent: str | None
) -> None:
    keys, sentence = OPTIONAL[anchor]

    def without(data: dict[str, Any]) -> None:
        for model in data["models"].values():
            for key in keys:
                model.pop(key, None) if absent else model.update({key: None})

    rest = drawn(folder, without)
    assert anchors(page) - anchors(rest) == {anchor}
    assert f'<p class="note absent">{sentence}' in rest


def test_one_float_model_alone_is_a_page(folder: Path) -> None:
    def alone(data: dict[str, Any]) -> None:
        data["models"] = {"float": data["models"]["float"]}
        data["gates"] = data["captions"] = None

    assert anchors(drawn(folder, alone)) == {"images", "command"}


@pytest.mark.usefixtures("no_plots")
def test_without_images_the_rest_is_drawn(tmp_path: Path, psnr: dict[str, list[float]]) -> None:
    page = draw(rewrite(tmp_path, record(psnr))).read_text()
    assert "images" not in anchors(page) and "The images are not beside the evidence." in page


def test_infinite_and_missing_numbers_are_drawn(folder: Path) -> None:
    def odd(data: dict[str, Any]) -> None:
        model = data["models"]["tfmq"]
        model["metrics"]["psnr"].update(value=float("inf"), low=None, high=None)
        model["per_image"]["psnr"][0] = None
        model["layers"]["error"][0][0] = float("nan")
        model["trajectory"]["error"][3] = float("nan")

    page = drawn(folder, odd)
    assert "∞ dB" in page
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<script.*</script>", "", page, flags=re.S))


def test_names_are_text_and_never_markup(folder: Path, page: str) -> None:
    def hostile(data: dict[str, Any]) -> None:
        data["title"] = data["models"]["tfmq"]["name"] = data["captions"][0] = (
            '</script><img src=x onerror="alert(1)">'
        )

    changed_page = drawn(folder, hostile)
    assert "<img src=x" not in changed_page
    assert changed_page.count("</script>") == page.count("</script>")


def test_a_name_may_look_like_a_formula_or_a_colour(folder: Path) -> None:
    """Plots show names letter by letter: no mathematics, no other colour."""
    name = "$x_1$ #1b1f24 模型"
    page = drawn(folder, lambda data: data["models"]["tfmq"].update(name=name))
    words = re.findall(r"<text [^>]+>([^<]*)</text>", page)
    assert words.count(name) == 2 * (1 + 1 + 2)


@pytest.mark.usefixtures("no_plots")
def test_a_metric_that_is_no_number_is_a_dash(folder: Path) -> None:
    """JSON holds no infinity: the PSNR of equal images is null."""

    def unknown(data: dict[str, Any]) -> None:
        data["models"]["tfmq"]["metrics"]["psnr"].update(value=None, low=None, high=None)
        data["gates"][1].update(value=None)

    page = drawn(folder, unknown)
    assert ">–<" in cells(page, "PSNR, dB")[2] and "PSNR no number, at least 22" in page


@pytest.mark.usefixtures("no_plots")
def test_a_page_of_heavy_images_stays_under_its_bound(tmp_path: Path) -> None:
    """Noise at 512 pixels, 19 MB of it: images shrink, and the page says so."""
    rng = np.random.default_rng(0)
    make(tmp_path)
    for path in (tmp_path / "images").rglob("*.png"):
        path.unlink()
    data = json.loads((tmp_path / "evidence.json").read_text())
    data["request"]["seeds"] = list(range(6))
    data["captions"] = []
    for key, model in data["models"].items():
        model.pop("per_image", None)
        for seed in range(6):
            Image.fromarray(rng.integers(0, 256, (512, 512, 3), np.uint8)).save(
                tmp_path / "images" / key / f"{seed}.png"
            )
    page = draw(rewrite(tmp_path, data))
    assert 1_000_000 < page.stat().st_size < MOST_BYTES
    assert "384×384 pixels" in page.read_text()


BAD: dict[str, tuple[Change, str]] = {
    "version": (
        lambda data: data.update(version=2),
        "found evidence of version 2; expected version 1",
    ),
    "reference": (
        lambda data: data.update(reference="none"),
        "found model 'none', expected one of float, minmax",
    ),
    "no title": (
        lambda data: data.pop("title"),
        "found evidence.json with a mistake (Object missing required field 'title')",
    ),
    "models": (
        lambda data: data.update(models=[]),
        "Expected 'object', got 'array' - at '$.models'",
    ),
    "bytes": (
        lambda data: data["models"]["tfmq"].update(bytes="1 MB"),
        "Expected 'int', got 'str' - at '$.models[...].bytes'",
    ),
    "no bytes": (
        lambda data: data["models"]["tfmq"].pop("bytes"),
        "Object missing required field 'bytes' - at '$.models[...]'",
    ),
    "zero bytes": (
        lambda data: data["models"]["tfmq"].update(bytes=0),
        "Expected 'int' >= 1 - at '$.models[...].bytes'",
    ),
    "captions": (
        lambda data: data["captions"].pop(),
        "found 15 values of captions, expected one for each of the 16 seeds",
    ),
    "gate": (
        lambda data: data["gates"][0].update(model="x"),
        "found model 'x', expected one of float, minmax",
    ),
    "ragged": (
        lambda data: data["models"]["tfmq"]["layers"]["error"][2].pop(),
        "x 7 or 8 errors, expected",
    ),
    "short": (
        lambda data: data["models"]["tfmq"]["trajectory"]["error"].pop(),
        f"found 1 x {len(TIMESTEPS) - 1} errors, expected 1 x {len(TIMESTEPS)}",
    ),
    "per image": (
        lambda data: data["models"]["tfmq"]["per_image"]["psnr"].pop(),
        "found 15 values of psnr",
    ),
    "seeds": (
        lambda data: data["request"]["seeds"].__setitem__(0, 99),
        "found no image",
    ),
    "no seeds": (
        lambda data: data["request"].update(seeds=[]),
        "Expected 'array' of length >= 1 - at '$.request.seeds'",
    ),
}


@pytest.mark.usefixtures("no_plots")
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
    with pytest.raises(BadInput, match="Expected 'object', got 'array'"):
        draw(tmp_path)


@pytest.mark.usefixtures("no_plots")
def test_wrong_images_are_one_sentence(folder: Path) -> None:
    Image.new("RGB", (16, 16)).save(folder / "images" / "tfmq" / "2.png")
    with pytest.raises(BadInput, match="found images of sizes 32x32 and 16x16"):
        draw(folder)
    (folder / "images" / "tfmq" / "2.png").write_text("no image")
    with pytest.raises(BadInput, match="that cannot be read"):
        draw(folder)


def test_drawing_imports_no_torch() -> None:
    program = "import sys, lowtide.report.page; print({'torch', 'diffusers'} & sys.modules.keys())"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )
