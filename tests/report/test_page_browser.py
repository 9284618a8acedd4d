"""report.html in headless Chromium: silent, offline, readable in both themes and on a phone."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report.evidence import FEW, SEEDS, make, rewrite

from lowtide.report.page import draw

playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed: pip install playwright"
)
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium: install the system's package, such as Debian's `chromium`"
)
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two pages; the models of the second have long names."""
    folders = {side: make(tmp_path_factory.mktemp(f"side{side}"), side) for side in (32, 64)}
    data = json.loads((folders[64] / "evidence.json").read_text())
    for key, model in data["models"].items():
        model["name"] = f"{key} with a name-that-nobody-would-call-short/or-break/in-two W4A8"
    rewrite(folders[64], data)
    return {side: draw(folder) for side, folder in folders.items()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # A container runs as root, where Chromium's own sandbox cannot start; the page is ours.
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, pages: dict[int, Path]) -> Iterator[Any]:
    """Opens the page; at the end, any message, error or request of it is a failure."""
    contexts = []
    noise = []

    def opened(side: int = 32, **options: Any) -> Any:
        context = browser.new_context(**({"viewport": DESKTOP} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on(
            "request",
            lambda request: (
                noise.append(request.url) if request.url.startswith(("http", "ws", "ftp")) else None
            ),
        )
        page.goto(pages[side].as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert noise == []


def seam(page: Any) -> float:
    """Where the two images meet, as a share of the stage's width, measured on the screen."""
    stage, handle = (page.locator(query).bounding_box() for query in (".stage", ".handle"))
    return (handle["x"] + handle["width"] / 2 - stage["x"]) / stage["width"]


def test_slider_follows_mouse_and_keys(open_page: Any) -> None:
    page = open_page()
    page.locator(".stage").scroll_into_view_if_needed()
    stage = page.locator(".stage").bounding_box()
    assert seam(page) == pytest.approx(0.5, abs=0.01)
    middle = stage["y"] + stage["height"] / 2
    page.mouse.move(stage["x"] + stage["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(stage["x"] + stage["width"] * 0.2, middle, steps=4)
    page.mouse.up()
    assert seam(page) == pytest.approx(0.2, abs=0.01)
    page.mouse.move(stage["x"] + stage["width"] * 0.9, middle)
    assert seam(page) == pytest.approx(0.2, abs=0.01)
    page.locator(".stage input").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert seam(page) == pytest.approx(0.25, abs=0.01)
    page.keyboard.press("End")
    assert seam(page) == pytest.approx(1.0, abs=0.01)


def test_slider_follows_a_finger(open_page: Any) -> None:
    page = open_page(viewport=PHONE, has_touch=True, is_mobile=True)
    page.locator(".stage").scroll_into_view_if_needed()
    stage = page.locator(".stage").bounding_box()
    page.touchscreen.tap(stage["x"] + stage["width"] * 0.7, stage["y"] + stage["height"] / 2)
    assert seam(page) == pytest.approx(0.7, abs=0.02)


def sources(page: Any) -> list[str]:
    return [page.locator(f".stage .{side}").get_attribute("src") for side in ("before", "after")]


def in_sheet(page: Any, model: int, seed: int) -> str:
    return (
        page.locator(".contact tbody tr").nth(model).locator("img").nth(seed).get_attribute("src")
    )


def test_pickers_choose_what_is_compared(open_page: Any) -> None:
    page = open_page()
    assert sources(page) == [in_sheet(page, 0, 0), in_sheet(page, 2, 0)]
    page.locator(".choose.right").select_option("1")
    page.get_by_role("button", name="Next", exact=True).click()
    assert sources(page) == [in_sheet(page, 0, 1), in_sheet(page, 1, 1)]
    page.locator(".contact tbody tr").nth(3).locator("button").nth(5).click()
    assert sources(page) == [in_sheet(page, 0, 5), in_sheet(page, 3, 5)]
    assert page.locator(".which").inner_text() == f"6 of {SEEDS}"
    page.get_by_text("Difference of the two").click()
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.after')).mixBlendMode")
        == "difference"
    )


def test_small_images_stay_sharp(open_page: Any) -> None:
    page = open_page(64)
    for query in (".stage .before", ".contact img"):
        assert (
            page.evaluate(f"getComputedStyle(document.querySelector('{query}')).imageRendering")
            == "pixelated"
        )
    assert page.evaluate("document.querySelector('.contact img').naturalWidth") == 64


def model_of(pages: dict[int, Path], key: str) -> dict[str, Any]:
    return json.loads((pages[32].parent / "evidence.json").read_text())["models"][key]


def rows_of(page: Any, summary: str) -> list[list[str]]:
    """The texts of a table that folds away, after its summary is opened."""
    details = page.locator("details", has=page.get_by_text(summary, exact=True)).first
    assert not details.locator("table").is_visible()
    details.locator("summary").click()
    assert details.locator("table").is_visible()
    rows = [row.locator("th, td").all_inner_texts() for row in details.locator("tbody tr").all()]
    return [[text.strip() for text in row] for row in rows]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_heat_map_has_the_colours_of_the_evidence(
    open_page: Any, pages: dict[int, Path], scheme: str
) -> None:
    """On the screen, a worse cell is darker on light paper, and lighter on dark paper."""
    page = open_page(color_scheme=scheme)
    error = np.array(model_of(pages, "tfmq")["layers"]["error"])
    image = page.locator("#layers svg.wide image").nth(1)
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    screen = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L")).astype(int)
    columns = box["x"] + (np.arange(error.shape[0]) + 0.5) / error.shape[0] * box["width"]
    rows = box["y"] + (np.arange(len(FEW)) + 0.5) / len(FEW) * box["height"]
    shown = screen[rows.astype(int)][:, columns.astype(int)].T
    order = np.argsort(error, axis=None)
    steps = np.diff(shown.ravel()[order]) * (1 if scheme == "light" else -1)
    assert steps.max() <= 1 and steps.sum() < -100


def test_the_worst_layer_is_named_with_its_timestep(open_page: Any, pages: dict[int, Path]) -> None:
    layers = model_of(pages, "tfmq")["layers"]
    error = np.array(layers["error"])
    worst = rows_of(open_page(), "Largest errors of tfmq W4A8")
    layer, step = np.unravel_index(error.argmax(), error.shape)
    assert worst[0][:2] == [layers["names"][layer], str(FEW[step])]
    assert float(worst[0][2]) == pytest.approx(error.max(), rel=6e-3)
    assert len(worst) == 10


def test_lines_have_the_numbers_of_the_evidence(open_page: Any, pages: dict[int, Path]) -> None:
    path = model_of(pages, "minmax")["trajectory"]
    rows = rows_of(open_page(), "All values")
    assert [int(row[0]) for row in rows] == path["timesteps"]
    assert [float(row[1]) for row in rows] == pytest.approx(path["error"], rel=6e-3)


def paper(page: Any) -> int:
    """How light the page is, from 0 to 255."""
    return page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")


def test_dark_follows_the_system(open_page: Any) -> None:
    """Paper is light or dark, and the words of line plots and of heat maps stand out."""
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        assert paper(page) > 240 if scheme == "light" else paper(page) < 30
        for words in ("#trajectory svg.wide text", "#layers svg.wide text"):
            shot = page.locator(words).first.screenshot()
            levels = np.asarray(Image.open(io.BytesIO(shot)).convert("L")).astype(int)
            ink = levels.min() if scheme == "light" else levels.max()
            assert ink < 110 if scheme == "light" else ink > 140


@pytest.mark.parametrize("side", [32, 64])
def test_plots_fit_the_screen(open_page: Any, side: int) -> None:
    """A phone has plots of its own, whose words can be read; no long name leaves its plot."""
    for viewport, room in ((DESKTOP, "wide"), (PHONE, "narrow")):
        page = open_page(side, viewport=viewport)
        for plot in (page.locator(f"{query} svg.{room}") for query in ("#trajectory", "#layers")):
            assert plot.is_visible()
            units = float(plot.get_attribute("viewBox").split()[2])
            assert 12 * plot.bounding_box()["width"] / units > 10
            edge = plot.bounding_box()["x"] + plot.bounding_box()["width"]
            boxes = [text.bounding_box() for text in plot.locator("text").all()]
            assert max(box["x"] + box["width"] for box in boxes) <= edge
        assert page.locator("#trajectory svg:visible").count() == 1


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_nothing_sticks_out_sideways(open_page: Any, side: int, width: int) -> None:
    page = open_page(side, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for summary in page.locator("details summary").all():
        if summary.is_visible():
            summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_everything_has_a_name(open_page: Any) -> None:
    """Images carry a text, and what takes the keyboard's focus says what it is."""
    page = open_page()
    assert page.evaluate("[...document.images].filter(image => !image.alt).length") == 0
    assert (
        page.evaluate("[...document.querySelectorAll('svg')].filter(e => !e.ariaLabel).length") == 0
    )
    name = "e.innerText?.trim() || e.ariaLabel || e.labels?.[0]?.innerText.trim()"
    nameless = f"e => !({name} || e.querySelector('img')?.alt)"
    query = "a, button, input, select, summary, [tabindex='0']"
    every = f'[...document.querySelectorAll("{query}")]'
    assert page.evaluate(f"{every}.filter({nameless}).map(e => e.outerHTML.slice(0, 90))") == []


def test_the_page_reads_without_a_script(open_page: Any) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator(".contact img").count() == 4 * SEEDS
    assert page.locator(".compare").is_hidden()
    assert page.locator("svg.wide").count() == 4
    assert all(plot.is_visible() for plot in page.locator("svg.wide").all())
    page.get_by_text("All values").first.click()
    assert page.locator("#trajectory details table").is_visible()
