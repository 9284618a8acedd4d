"""report.html in headless Chromium: silent, offline, and everything on it that moves, moves."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report.evidence import FEW, SEEDS, make

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
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {side: draw(make(tmp_path_factory.mktemp(f"side{side}"), side)) for side in (32, 64)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # A container runs as root, where Chromium's own sandbox cannot start; the page is ours.
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, pages: dict[int, Path]) -> Iterator[Any]:
    """Opens the page, and at the end fails on anything that it said or asked for."""
    contexts, noise = [], []

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


def test_heat_map_reads_out_the_evidence(open_page: Any, pages: dict[int, Path]) -> None:
    page = open_page()
    layers = json.loads((pages[32].parent / "evidence.json").read_text())["models"]["tfmq"][
        "layers"
    ]
    page.locator("#layers .picker label").nth(1).click()
    panels = page.locator("#layers .panel")
    assert [panels.nth(place).is_visible() for place in range(2)] == [False, True]
    cells = panels.nth(1).locator(".cells")
    cells.scroll_into_view_if_needed()
    box = cells.bounding_box()
    column, row = 7, 5
    across, down = (column + 0.5) / len(layers["names"]), (row + 0.5) / len(FEW)
    page.mouse.move(box["x"] + box["width"] * across, box["y"] + box["height"] * down)
    told = page.locator("#layers .readout span").all_inner_texts()
    assert told[:2] == [layers["names"][column], f"timestep {FEW[row]}"]
    assert float(told[2].split(": ")[1]) == pytest.approx(layers["error"][column][row], rel=6e-3)
    cells.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#layers .readout span").first.inner_text() == layers["names"][column - 1]


def test_lines_read_out_the_evidence(open_page: Any, pages: dict[int, Path]) -> None:
    page = open_page()
    path = json.loads((pages[32].parent / "evidence.json").read_text())["models"]["minmax"][
        "trajectory"
    ]
    page.locator("#trajectory .field").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    told = page.locator("#trajectory .readout span").all_inner_texts()
    assert told[0] == f"timestep {path['timesteps'][3]}"
    assert float(told[1].removeprefix("minmax W4A8 ")) == pytest.approx(path["error"][3], rel=6e-3)


def paper(page: Any) -> int:
    """How light the page is, from 0 to 255."""
    return page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")


def test_dark_follows_the_system_and_the_button(open_page: Any) -> None:
    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    assert paper(light) > 240 and paper(dark) < 30
    for page, scheme in ((light, "light"), (dark, "dark")):
        assert page.locator(f"#layers .panel:not([hidden]) .only-{scheme}").is_visible()
        page.get_by_role("button", name="Switch to").click()
    assert paper(light) < 30 and paper(dark) > 240
    assert light.locator("#layers .panel:not([hidden]) .only-dark").is_visible()
    light.reload()
    assert paper(light) < 30


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
    assert (
        page.evaluate(
            "[...document.images].filter(image => !image.alt && !image.closest('.cells')).length"
        )
        == 0
    )
    nameless = "e => !(e.innerText?.trim() || e.ariaLabel || e.labels?.[0]?.innerText.trim())"
    query = "a, button, input, select, summary, [tabindex='0']"
    assert (
        page.evaluate(
            f'[...document.querySelectorAll("{query}")].filter({nameless}).map(e => e.outerHTML.slice(0, 90))'
        )
        == []
    )


def test_the_page_reads_without_a_script(open_page: Any) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator(".contact img").count() == 4 * SEEDS
    assert page.locator(".compare").is_hidden()
    assert all(panel.is_visible() for panel in page.locator(".panel").all())
