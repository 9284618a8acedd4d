"""The page of `lowtide serve`: what it draws, what it refuses, and the page in a browser."""

import base64
import http.client
import io
import json
import shutil
from contextlib import contextmanager
from threading import Thread

import numpy as np
import pytest
import tiny
from PIL import Image

import lowtide
from lowtide import cli, sampling
from lowtide.errors import BadInput
from lowtide.report.grids import pixels
from lowtide.workflows import exhibit_server
from lowtide.workflows.exhibit import Exhibit

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model and what minmax made of it at two widths."""
    home = tmp_path_factory.mktemp("models")
    lowtide.save(sampling.as_pipeline(tiny.model("unet2d")), home / "cats")
    for weights in (8, 3):
        lowtide.quantize(home / "cats", method="minmax", weights=weights, steps=2, images=2).save(
            home / f"w{weights}"
        )
    return home


@pytest.fixture(scope="module")
def exhibit(folders):
    return Exhibit([folders / "w8", folders / "w3"])


@contextmanager
def served(exhibit):
    with exhibit_server.ExhibitServer(exhibit, port=0) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(exhibit):
    with served(exhibit) as running:
        yield running


def ask(server, method="POST", path="/draw", body="{}", **headers):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    headers = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def image_of(drawn):
    data = base64.b64decode(drawn["image"].partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(data)))


def test_each_model_draws_the_image_that_it_samples_itself(exhibit, folders):
    drawn = exhibit.draw({"seed": 5})
    request = sampling.Request(steps=2, seeds=(5,), batch=1)
    for folder, each in zip(("cats", "w8", "w3"), drawn["images"], strict=True):
        pipe = sampling.load_pipeline(str(folders / folder))
        expected = pixels(sampling.run_pipeline(pipe, request))[0].squeeze()
        assert np.array_equal(image_of(each), expected)
    float_one, eight, three = drawn["images"]
    assert float_one["psnr"] is None
    assert eight["psnr"] > three["psnr"] + 3
    assert all(each["seconds"] > 0 for each in drawn["images"])


def test_the_page_asks_for_what_the_pipeline_takes(exhibit):
    described = exhibit.describe()
    assert described["prompts"] is None
    assert described["labels"] is None
    assert not described["guided"]
    assert described["steps"] == 2  # the checkpoint's own number
    sizes = [model["bytes"] for model in described["models"]]
    assert sizes == sorted(sizes, reverse=True)


def test_another_number_of_steps_is_drawn_too(exhibit):
    assert exhibit.draw({"steps": 3})["steps"] == 3


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"size": 64}, "found 'size'; expected some of prompt"),
        ({"prompt": "a cat"}, "found prompts for a"),
        ({"seed": -1}, "seed"),
        ({"seed": "one"}, "seed"),
        ({"steps": 10**9}, "at most 1000"),
    ],
)
def test_a_wrong_request_is_one_sentence(server, asked, words):
    status, body = ask(server, body=json.dumps(asked))
    assert status == 400
    assert words in json.loads(body)["error"]


def test_strangers_are_turned_away(server):
    assert ask(server, "GET", "/", None)[0] == 200
    assert ask(server, "GET", "/etc/passwd", None)[0] == 404
    assert ask(server, "GET", "/", None, Host="evil.example:80")[0] == 403
    assert ask(server, Host="evil.example:80")[0] == 404
    assert ask(server, Content_Type="text/plain")[0] == 404
    assert ask(server, body="not json")[0] == 400
    assert ask(server, body="[]")[0] == 400
    assert ask(server, body=" " * (exhibit_server.MOST_BYTES + 1))[0] == 413


def test_a_taken_port_and_a_missing_reference(server, exhibit, tmp_path, folders):
    with pytest.raises(BadInput, match=r"not to be had.*--port"):
        exhibit_server.ExhibitServer(exhibit, port=server.server_address[1])
    moved = tmp_path / "w8"
    shutil.copytree(folders / "w8", moved)
    (moved / "lowtide.json").unlink()
    with pytest.raises(BadInput, match="--reference"):
        Exhibit([moved])


def test_the_command(folders, monkeypatch, capsys):
    monkeypatch.setattr(exhibit_server.ExhibitServer, "serve_forever", lambda self: None)
    command = ["lowtide", "serve", str(folders / "w8"), "--port", "0", "--host", "127.0.0.1"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "shows 2 models; Ctrl-C ends it" in capsys.readouterr().out


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_draws_and_slides(server):
    driver_of = pytest.importorskip("playwright.sync_api").sync_playwright
    with driver_of() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = chromium.new_page()
        noise = []
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.goto(server.address)
        page.wait_for_selector('.status:has-text("seed 0, 2 steps")')
        first = page.get_attribute(".stage .after", "src")
        assert page.text_content("tbody tr:nth-child(2) .psnr") != "–"
        page.click(".next")
        page.wait_for_selector('.status:has-text("seed 1, 2 steps")')
        assert page.get_attribute(".stage .after", "src") != first
        page.select_option("select.right", "2")
        assert "W3A8" in page.text_content(".side.right")
        slide = page.locator(".stage input")
        slide.focus()
        slide.press("Home")
        assert page.evaluate("document.querySelector('.stage').style.cssText").endswith("0%;")
        page.fill("[name=seed]", "9999999999999999999999")
        page.click(".go")
        page.wait_for_selector(".trouble:visible")
        assert "seed" in page.text_content(".trouble")
        # Chromium itself notes the refused request.
        assert all("400" in line for line in noise)
        chromium.close()
